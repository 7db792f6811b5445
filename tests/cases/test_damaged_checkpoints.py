"""No byte of a checkpoint is used that is not the one written: what readers do about damage."""

import json
import random
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import xxhash

from speechlm2_jax.checkpointing import (
    Checkpointer,
    DamagedError,
    Retention,
    intact_step,
    load_weights,
    read_item,
    read_ranking,
    restore,
    step_folders,
    write_checksums,
)
from speechlm2_jax.pretrained.save_load import run_definition
from tests.test_checkpointing import (
    FROZEN,
    arrays,
    frozen_template,
    one_device,
    save_all,
    template,
)

CHECKSUMS = "checksums.xxh3"
FAST_FLIPS = 12
LOST_ALL = "no checkpoint of .* can be read"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    metrics = {1: {"val_loss": 0.3}, 2: {"val_loss": 0.2}}
    save_all(folder, {1: 1, 2: 2}, metrics=metrics)
    return folder


@pytest.fixture
def folder(written, tmp_path):
    return Path(shutil.copytree(written, tmp_path / "checkpoints"))


def frozen_again():
    return [{path: jnp.asarray(value) for path, value in FROZEN.items()}]


def read(folder, rebuild=frozen_again):
    sharding = one_device()
    return restore(folder, None, template(sharding), frozen_template(sharding), rebuild)


def held(restored):
    """The value that `arrays` was made from."""
    values = np.asarray(restored.arrays["params"]["a.bias"]) - np.arange(8)
    np.testing.assert_array_equal(restored.frozen["base.weight"], FROZEN["base.weight"])
    assert len(set(values)) == 1
    return int(values[0])


def flip(file, bit):
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def kind(file):
    """Names of files without what differs from run to run."""
    return "data" if file.parent.name == "d" else file.name


def chosen_flips(folder, count, seed=0):
    """So many bits of the newest step, of frozen/ and of the ranking: every kind of file first."""
    chance = random.Random(seed)
    older = step_folders(folder)[1:]
    files = [f for f in files_of(folder) if not any(step in f.parents for step in older)]
    first = {(f.relative_to(folder).parts[0], kind(f)): f for f in files}
    picked = [*first.values(), *chance.choices(files, k=count)][:count]
    return [(f, chance.randrange(8 * f.stat().st_size)) for f in picked]


def test_every_file_of_a_step_and_of_the_frozen_store_has_its_checksum(folder):
    for part in (folder / "2", folder / "frozen"):
        lines = (part / CHECKSUMS).read_text().splitlines(keepends=True)
        listed = dict(line.split()[::-1] for line in lines if not line.startswith("#"))
        files = {str(f.relative_to(part)): f for f in files_of(part) if f.name != CHECKSUMS}
        assert listed == {
            name: xxhash.xxh3_128_hexdigest(file.read_bytes()) for name, file in files.items()
        }
        seal = xxhash.xxh3_128_hexdigest("".join(lines[:-1]).encode())
        assert lines[-1] == f"# checksums {seal}\n"


def test_a_step_never_appears_without_its_checksums(tmp_path, monkeypatch):
    def fails(*_):
        raise OSError("disk full")

    monkeypatch.setattr("speechlm2_jax.checkpointing.committing.write_checksums", fails)
    checkpointer = Checkpointer(tmp_path, Retention())
    checkpointer.save(1, arrays(1), progress={}, settings={})
    with pytest.raises(RuntimeError, match="disk full"):
        checkpointer.wait()
    assert not step_folders(tmp_path)
    monkeypatch.undo()
    save_all(tmp_path, {2: 2})
    assert [step.name for step in step_folders(tmp_path)] == ["2"]
    assert not list(tmp_path.glob("*tmp*"))


def test_a_dozen_flipped_bits_are_all_seen(written, tmp_path, caplog):
    flips = chosen_flips(written, FAST_FLIPS)
    assert len({kind(file) for file, _ in flips}) >= FAST_FLIPS // 2
    for number, (file, bit) in enumerate(flips):
        folder = Path(shutil.copytree(written, tmp_path / str(number)))
        damaged = folder / file.relative_to(written)
        flip(damaged, bit)
        caplog.clear()
        restored, weights = read(folder), load_weights(folder, rebuild_frozen=lambda *_: [FROZEN])
        assert str(damaged) in caplog.text
        expected = 1 if "2" in damaged.relative_to(folder).parts else 2
        assert held(restored) == weights.step == expected
        assert restored.has_rebuilt_frozen == ("frozen" in damaged.parts)


@pytest.mark.parametrize(
    "how", ["cut", "emptied", "removed", "added", "checksums removed", "checksums cut", "exchanged"]
)
def test_other_damage_costs_one_step_and_one_line(folder, caplog, how):
    step = folder / "2"
    data = max(step.glob("params/ocdbt.process_0/d/*"), key=lambda file: file.stat().st_size)
    named = data
    if how == "cut":
        data.write_bytes(data.read_bytes()[:-1])
    elif how == "emptied":
        data.write_bytes(b"")
    elif how == "removed":
        data.unlink()
    elif how == "added":
        named = step / "params" / "d" / "another"
        named.write_text("")
    elif how == "checksums removed":
        named = step / CHECKSUMS
        named.unlink()
    elif how == "checksums cut":
        named = step / CHECKSUMS
        named.write_text("".join(named.read_text().splitlines(keepends=True)[1:]))
    else:
        named = step / "progress" / "metadata"
        shutil.copy(folder / "1" / "progress" / "metadata", named)
    assert held(read(folder)) == 1 and load_weights(folder).step == 1
    assert intact_step(folder) == folder / "1"
    assert len(caplog.messages) == 2
    for message in caplog.messages:
        assert str(named) in message and "trying the one before it" in message
        assert "\n" not in message


def test_what_file_systems_leave_behind_is_no_damage(folder):
    for name in (".nfs0000000001", ".DS_Store", "._params"):
        (folder / "2" / "params" / name).write_text("x")
    assert held(read(folder)) == 2


def test_json_of_a_damaged_step_is_not_believed(folder):
    file = folder / "2" / "progress" / "metadata"
    file.write_text(file.read_text().replace("2", "3"))
    with pytest.raises(DamagedError, match="progress/metadata has changed"):
        read_item(folder / "2", "progress")
    assert read_item(folder / "2", "settings")


def test_one_line_where_every_step_is_damaged(folder):
    for step in ("1", "2"):
        flip(folder / step / "settings" / "metadata", 9)
    with pytest.raises(DamagedError, match=LOST_ALL):
        read(folder)
    with pytest.raises(DamagedError, match="1/settings/metadata has changed") as raised:
        load_weights(folder)
    assert "\n" not in str(raised.value)
    assert intact_step(folder) is None


def test_a_step_that_is_asked_for_by_number_is_not_replaced(folder):
    flip(folder / "2" / "params" / "_METADATA", 100)
    with pytest.raises(DamagedError, match="params/_METADATA has changed"):
        load_weights(folder, 2)


def without_checksums(folder):
    """What an older version would have written."""
    for file in files_of(folder):
        if file.name == CHECKSUMS:
            file.unlink()
        elif file.name == "_CHECKPOINT_METADATA":
            stored = json.loads(file.read_text())
            file.write_text(json.dumps({**stored, "custom_metadata": {}}))


def test_an_older_version_is_read_with_one_warning_and_gets_checksums(folder, caplog):
    without_checksums(folder)
    for _ in range(2):
        assert held(read(folder)) == load_weights(folder).step == 2
    assert len(caplog.messages) == 1 and "older version have no checksums" in caplog.text
    save_all(folder, {3: 3})
    file = next((folder / "frozen" / "d").iterdir())
    flip(file, 77)
    caplog.clear()
    assert read(folder).has_rebuilt_frozen
    assert f"{file} has changed" in caplog.text


@pytest.mark.parametrize("how", ["flipped", "removed", "checksums removed", "of another run"])
def test_a_damaged_frozen_store_is_rebuilt_or_named(folder, tmp_path, caplog, how):
    store = folder / "frozen"
    if how == "flipped":
        flip(next((store / "d").iterdir()), 99)
    elif how == "checksums removed":
        (store / CHECKSUMS).unlink()
    else:
        shutil.rmtree(store)
    if how == "of another run":
        other = Checkpointer(tmp_path / "other", Retention())
        other.save_frozen({"base.weight": jnp.zeros((2, 3), jnp.bfloat16)})
        other.close()
        shutil.copytree(tmp_path / "other" / "frozen", store)
    restored = read(folder)
    assert held(restored) == 2 and restored.has_rebuilt_frozen
    assert len(caplog.messages) == 1 and str(store) in caplog.text
    with pytest.raises(DamagedError, match="have no source"):
        read(folder, None)
    with pytest.raises(DamagedError, match="has other values now"):
        read(folder, lambda: [{path: -value for path, value in FROZEN.items()}])
    with pytest.raises(DamagedError, match=r"cannot be read \(parts/llm: gone\)"):
        read(folder, source_is_gone)


def source_is_gone():
    raise FileNotFoundError("parts/llm: gone")


@pytest.mark.parametrize("how", ["changed", "removed"])
def test_a_damaged_ranking_is_told_and_costs_no_step(folder, caplog, how):
    ranking = folder / "ranking.json"
    if how == "changed":
        ranking.write_text(ranking.read_text().replace("0.3", "0.1"))
    else:
        ranking.unlink()
    assert read_ranking(folder).problem and not caplog.messages
    assert load_weights(folder).step == 2
    assert len(caplog.messages) == 1 and str(ranking) in caplog.text
    save_all(folder, {3: 3, 4: 4, 5: 5}, retention=Retention(top_k=1))
    assert [step.name for step in step_folders(folder)] == ["5", "4", "2", "1"]


def test_the_definition_of_a_run_is_compared_too(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"rope_theta": 1}')
    assert run_definition(tmp_path) == folder  # of an older version
    write_checksums(folder, {})
    assert run_definition(tmp_path) == folder
    (folder / "config.json").write_text('{"rope_theta": 9}')
    with pytest.raises(DamagedError, match=r"model/config.json has changed .* resume the run"):
        run_definition(tmp_path)


def test_a_removed_list_of_a_definition_is_damage_unless_the_run_is_older(folder, tmp_path):
    """The steps of the run tell whether its version writes checksums."""
    definition = tmp_path / "model"
    definition.mkdir()
    (definition / "config.json").write_text("{}")
    write_checksums(definition, {})
    assert run_definition(tmp_path) == definition
    listed = definition / CHECKSUMS
    listed.unlink()
    with pytest.raises(DamagedError, match=r"model/checksums.xxh3 is missing; resume the run"):
        run_definition(tmp_path)
    listed.write_text("unchecked\n")
    assert run_definition(tmp_path) == definition
    listed.write_text("")
    with pytest.raises(DamagedError, match=r"has changed since it was written; resume the run"):
        run_definition(tmp_path)
    listed.unlink()
    metadata = folder / "2" / "_CHECKPOINT_METADATA"
    kept = metadata.read_text()
    metadata.write_text("{")  # another step tells it
    with pytest.raises(DamagedError, match="is missing"):
        run_definition(tmp_path)
    metadata.write_text(kept)
    without_checksums(folder)
    assert run_definition(tmp_path) == definition


def test_how_many_of_the_latest_stay(tmp_path):
    save_all(tmp_path, dict.fromkeys(range(1, 5), 1), retention=Retention(latest=1, top_k=0))
    assert [step.name for step in step_folders(tmp_path)] == ["4"]
