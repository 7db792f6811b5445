"""A FastConformer in NumPy, float64, one clip at a time without padding, as in NeMo."""

import numpy as np


def encode(config, weights, x):
    """Encodes features [T, F] with weights under NeMo's names into frames [T', D]."""
    w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    x = subsample(config, w, np.asarray(x, np.float64))
    x = x * (np.sqrt(config.d_model) if config.xscaling else 1.0)
    if config.self_attention_model == "abs_pos":
        x = x + table(np.arange(len(x)), config.d_model)
    for i in range(config.n_layers):
        layer = {k[len(p) :]: v for k, v in w.items() if k.startswith(p := f"layers.{i}.")}
        x = x + 0.5 * feed_forward(layer, "feed_forward1", norm(layer, "norm_feed_forward1", x))
        x = x + attention(config, layer, norm(layer, "norm_self_att", x))
        x = x + convolution(config, layer, norm(layer, "norm_conv", x))
        x = x + 0.5 * feed_forward(layer, "feed_forward2", norm(layer, "norm_feed_forward2", x))
        x = norm(layer, "norm_out", x)
    return linear(w, "out_proj", x) if "out_proj.weight" in w else x


def linear(w, name, x):
    weight = w[f"{name}.weight"]
    return x @ weight.reshape(len(weight), -1).T + w.get(f"{name}.bias", 0.0)


def norm(w, name, x):
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def feed_forward(w, name, x):
    hidden = linear(w, f"{name}.linear1", x)
    return linear(w, f"{name}.linear2", hidden * sigmoid(hidden))


def table(numbers, width):
    rates = np.exp(-np.log(1e4) * np.arange(0, width, 2) / width)
    angles = np.asarray(numbers, np.float64)[..., None] * rates
    return np.stack([np.sin(angles), np.cos(angles)], -1).reshape(*angles.shape[:-1], width)


def subsample(config, w, x):
    factor = config.subsampling_factor
    if factor == 1:
        return linear(w, "pre_encode", x)
    if config.subsampling.startswith("stacking"):
        x = np.concatenate([x, np.zeros((-len(x) % factor, x.shape[1]))])
        if config.subsampling == "stacking_norm":
            x = norm(w, "pre_encode.pre_norm", x)
        return linear(w, "pre_encode.proj_out", x.reshape(len(x) // factor, -1))
    x = np.maximum(conv2d(config, w, "pre_encode.conv.0", x[None]), 0.0)
    place = 2
    for _ in range(factor.bit_length() - 2):
        x = conv2d(config, w, f"pre_encode.conv.{place}", x)
        if config.subsampling == "dw_striding":
            x = np.moveaxis(linear(w, f"pre_encode.conv.{place + 1}", np.moveaxis(x, 0, -1)), -1, 0)
        place += 3 if config.subsampling == "dw_striding" else 2
        x = np.maximum(x, 0.0)
    return linear(w, "pre_encode.out", x.transpose(1, 0, 2).reshape(x.shape[1], -1))


def conv2d(config, w, name, x):
    """3x3, stride 2, over [C, T, F]."""
    before, after = (2, 1) if config.causal_downsampling else (1, 1)
    x = np.pad(x, ((0, 0), (before, after), (before, after)))
    kernel, bias = w[f"{name}.weight"], w[f"{name}.bias"]
    length, bins = ((n - 3) // 2 + 1 for n in x.shape[1:])
    y = np.zeros((len(kernel), length, bins))
    for t in range(length):
        for f in range(bins):
            patch = x[:, 2 * t : 2 * t + 3, 2 * f : 2 * f + 3]
            if kernel.shape[1] == 1 and len(x) > 1:
                y[:, t, f] = (patch * kernel[:, 0]).sum((1, 2))
            else:
                y[:, t, f] = np.einsum("cij,ocij->o", patch, kernel)
    return y + bias[:, None, None]


def sees(config, i, j):
    left, right = config.contexts[0]
    if config.att_context_style == "regular":
        return (left < 0 or i - j <= left) and (right < 0 or j - i <= right)
    chunk = right + 1
    back = i // chunk - j // chunk
    return back >= 0 and (left < 0 or back <= left // chunk)


def attention(config, w, x):
    length, width = x.shape
    heads = config.n_heads
    split = lambda y: y.reshape(-1, heads, width // heads)  # noqa: E731
    q, k, v = (split(linear(w, f"self_attn.linear_{n}", x)) for n in "qkv")
    out = np.zeros_like(q)
    for i in range(length):
        visible = [j for j in range(length) if sees(config, i, j)]
        scores = np.einsum("nh,jnh->jn", q[i] + w.get("self_attn.pos_bias_u", 0.0), k[visible])
        if config.self_attention_model == "rel_pos":
            distances = table(i - np.array(visible), width)
            p = split(distances @ w["self_attn.linear_pos.weight"].T)
            scores = scores + np.einsum("nh,jnh->jn", q[i] + w["self_attn.pos_bias_v"], p)
        scores = np.exp((scores - scores.max(0)) / np.sqrt(width // heads))
        out[i] = np.einsum("jn,jnh->nh", scores / scores.sum(0), v[visible])
    return linear(w, "self_attn.linear_out", out.reshape(length, width))


def convolution(config, w, x):
    value, gate = np.split(linear(w, "conv.pointwise_conv1", x), 2, axis=-1)
    x = value * sigmoid(gate)
    kernel = w["conv.depthwise_conv.weight"][:, 0]
    padded = np.pad(x, (config.conv_context, (0, 0)))
    y = np.stack([(padded[t : t + kernel.shape[1]] * kernel.T).sum(0) for t in range(len(x))])
    y = conv_norm(config, w, y + w.get("conv.depthwise_conv.bias", 0.0))
    return linear(w, "conv.pointwise_conv2", y * sigmoid(y))


def conv_norm(config, w, y):
    if config.conv_norm_type == "layer_norm":
        return norm(w, "conv.batch_norm", y)
    if config.conv_norm_type == "batch_norm":
        mean, variance = w["conv.batch_norm.running_mean"], w["conv.batch_norm.running_var"]
    else:
        groups = y.reshape(len(y), int(config.conv_norm_type.removeprefix("group_norm")), -1)
        repeat = groups.shape[2]
        mean = groups.mean((0, 2)).repeat(repeat)
        variance = groups.var((0, 2)).repeat(repeat)
    y = (y - mean) / np.sqrt(variance + 1e-5)
    return y * w["conv.batch_norm.weight"] + w["conv.batch_norm.bias"]
