"""The recipe barista: how its data are divided, what its orders mean, and that its keys count."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.tools.recipe_case import check_salm_recipe
from tools import prepare_barista

RATE_HZ = 16_000
LABELS = [
    {"intent": "orderDrink", "size": size, "coffeeDrink": drink}
    for size in ("small ", "large")  # the archive has values with a space behind
    for drink in ("latte", "mocha")
]
RECORDINGS = 40
QUIET_S, ORDER_S = 1.0, 1.5
SENTENCES = (
    "brew a dark roast small espresso with a lot of milk and brown sugar",
    "get me a latte",
)


def recording() -> np.ndarray:
    order = 0.1 * np.random.default_rng(0).standard_normal(int(ORDER_S * RATE_HZ))
    return np.pad(order, int(QUIET_S * RATE_HZ)).astype(np.float32)


def label_of(number: int) -> dict[str, str]:
    """The last recording alone has a label of its own."""
    if number == RECORDINGS - 1:
        return {"intent": "orderDrink", "coffeeDrink": "americano"}
    return LABELS[number % len(LABELS)]


def write_archive(folder: Path) -> None:
    """The repository's files, in small."""
    for name in ("speech/clean", "label", "noise", "watson"):
        (folder / "data" / name).mkdir(parents=True)
    labels = {}
    for i in range(RECORDINGS):
        name = f"{i:08x}-51bb.wav"
        soundfile.write(folder / "data/speech/clean" / name, recording(), RATE_HZ)
        intent, *slots = label_of(i).items()
        labels[name] = {intent[0]: intent[1], "slots": dict(slots)}
    (folder / "data/label/label.json").write_text(json.dumps(labels))
    noise = np.random.default_rng(1).uniform(-0.1, 0.1, 90 * RATE_HZ)
    soundfile.write(folder / "data/noise/kitchen.wav", noise, RATE_HZ)
    (folder / "data/watson/corpus.txt").write_text("\n".join(SENTENCES) + "\n")


def write_flat(folder: Path, archive: Path) -> None:
    """The same as a manifest beside its audio."""
    (folder / "audio").mkdir(parents=True)
    rows = []
    for i in range(RECORDINGS):
        name = f"audio/{i:08x}.flac"
        soundfile.write(folder / name, recording(), RATE_HZ)
        rows.append({"audio_filepath": name, "duration": 3.5, "text": json.dumps(label_of(i))})
    (folder / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    noise, rate_hz = soundfile.read(archive / "data/noise/kitchen.wav")
    soundfile.write(folder / "kitchen_noise.flac", noise, rate_hz)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with what the program writes of both forms: `barista` and `flat`."""
    folder = tmp_path_factory.mktemp("prepared")
    write_archive(folder / "archive")
    write_flat(folder / "copy", folder / "archive")
    prepare_barista.main(folder / "barista", folder / "archive", 0)
    prepare_barista.main(folder / "flat", folder / "copy", 0)
    return folder


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


SETS = ("train", "validation", "test_seen", "test_unseen")


def test_both_forms_of_the_data_are_divided_alike(prepared):
    for name in SETS:
        one, other = (rows_of(prepared / f / f"{name}.jsonl") for f in ("barista", "flat"))
        assert [row["text"] for row in one] == [row["text"] for row in other]
        stems = [[Path(row["audio_filepath"]).name[:8] for row in rows] for rows in (one, other)]
        assert stems[0] == stems[1]
    sets = {name: rows_of(prepared / "barista" / f"{name}.jsonl") for name in SETS}
    assert sum(map(len, sets.values())) == RECORDINGS
    assert min(len(sets[name]) for name in ("train", "validation", "test_seen")) > 0


def test_a_recording_keeps_its_set_when_others_are_added(prepared):
    rows = rows_of(prepared / "barista/train.jsonl")
    assert prepare_barista.split(rows[:3])["train"] == rows[:3]


def test_labels_are_short_and_alike_and_unseen_ones_are_apart():
    def row(name, text):
        return {"audio_filepath": name, "text": text}

    names = [f"{i:08x}.wav" for i in range(60)]
    by_set = {prepare_barista.set_of(row(name, "")): name for name in names}
    rows = [row(by_set["train"], "a"), row(by_set["test"], "a"), row(by_set["test"], "b")]
    sets = prepare_barista.split(rows)
    assert [r["text"] for r in sets["test_seen"]] == ["a"]
    assert [r["text"] for r in sets["test_unseen"]] == ["b"]
    text = prepare_barista.canonical({"intent": "orderDrink", "coffeeDrink": "latte"})
    assert text == '{"coffeeDrink":"latte","intent":"orderDrink"}'


def test_trimming_leaves_the_order_and_little_silence(prepared):
    whole = rows_of(prepared / "barista/train.jsonl")
    for row, before in zip(rows_of(prepared / "barista/train_trimmed.jsonl"), whole, strict=True):
        margin_s = sum(prepare_barista.MARGIN_S)
        assert row["duration"] == pytest.approx(ORDER_S + margin_s, abs=0.03)
        assert row["offset"] == pytest.approx(QUIET_S - prepare_barista.MARGIN_S[0], abs=0.02)
        assert row["text"] == before["text"]


def test_the_noise_of_the_test_is_not_in_training(prepared):
    whole, _ = soundfile.read(prepared / "archive/data/noise/kitchen.wav", dtype="int16")
    parts = [soundfile.read(prepared / f"barista/noise_{n}.flac", dtype="int16")[0] for n in SPLIT]
    assert len(parts[0]) == prepare_barista.TRAINING_NOISE_S * RATE_HZ
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    (row,) = rows_of(prepared / "barista/noise.jsonl")
    assert row["audio_filepath"] == "noise_train.flac"


SPLIT = ("train", "test")


def test_synthetic_orders_have_no_label_that_is_left_out():
    label = prepare_barista.canonical(prepare_barista.parse_order("get me a latte"))
    planned = prepare_barista.plan_orders(list(SENTENCES), 60, {label})
    labels = [prepare_barista.canonical(prepare_barista.parse_order(u.text)) for u in planned]
    assert label not in labels and len(set(labels)) > 30
    assert planned == prepare_barista.plan_orders(list(SENTENCES), 60, {label})


def test_slots_of_an_order():
    assert prepare_barista.parse_order(SENTENCES[0]) == {
        "coffeeDrink": "espresso",
        "intent": "orderDrink",
        "milkAmount": "a lot of milk",
        "roast": "dark roast",
        "size": "small",
        "sugarAmount": "brown sugar",
    }
    order = prepare_barista.parse_order("may I have a medium medium roast iced coffee")
    assert [order[key] for key in ("size", "roast")] == ["medium", "medium roast"]
    for wrong in ("get me a green latte", "get me a latte and a mocha", "brew a"):
        with pytest.raises(ValueError, match="no order"):
            prepare_barista.parse_order(wrong)


def test_a_varied_order_keeps_its_slots():
    rng = np.random.default_rng(0)
    for _ in range(50):
        varied = prepare_barista.vary_order(SENTENCES[0], rng)
        slots = prepare_barista.parse_order(varied)
        assert slots.keys() == prepare_barista.parse_order(SENTENCES[0]).keys()


def test_every_key_of_the_recipe_is_known(prepared, monkeypatch):
    for name in ("synthetic", "validation"):
        rows = rows_of(prepared / "barista/train.jsonl")
        prepare_barista.write_manifest(prepared / f"barista/{name}.jsonl", rows)
    monkeypatch.chdir(prepared)
    check_salm_recipe("barista")
