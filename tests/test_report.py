"""The report: its figures are the store's, hostile content stays text, every kind of data shows."""

import base64
import hashlib
import html
import io
import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import Classifier, checkpoints, loader, mlp, quickstart, target_set, train_set, trainer
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

import trak_dropout as td
from trak_dropout import metrics
from trak_dropout.attribution import AttributionStore
from trak_dropout.cli import main
from trak_dropout.lightning import GradientCollector
from trak_dropout.report import Example, Examples, Table, write
from trak_dropout.report.analysis import checkpoints as look_at
from trak_dropout.report.examples import clipped, pixels, shown
from trak_dropout.report.pictures import COLUMNS, Sheets
from trak_dropout.store import IncompleteStoreError, Store

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def collected(folder: Path, proj_dim: int) -> AttributionStore:
    torch.manual_seed(0)
    collector = GradientCollector(folder / "store", proj_dim=proj_dim)
    trainer(callbacks=[collector]).fit(Classifier(mlp()), loader(train_set(), shuffle=True))
    collector.store.add_targets("test", loader(target_set()), progress=False)
    return collector.store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> AttributionStore:
    return collected(tmp_path_factory.mktemp("run"), 64)


@pytest.fixture(scope="module")
def wide_store(tmp_path_factory: pytest.TempPathFactory) -> AttributionStore:
    return collected(tmp_path_factory.mktemp("run"), 512)


def content(page: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="content">(.*?)</script>',
                      page.read_text(), re.DOTALL)  # fmt: skip
    assert found
    return json.loads(found[1])


@pytest.mark.parametrize(
    ("which", "curvature"), [("store", "output"), ("store", "loss"), ("wide_store", "loss")]
)
def test_figures_are_those_of_the_store(
    which: str, curvature: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    store: AttributionStore = request.getfixturevalue(which)
    page = tmp_path / "report.html"
    suspicion = store.self_influence(curvature=curvature)
    wrong = np.zeros(300, dtype=bool)
    wrong[suspicion.argsort()[-20:]] = True
    labels = train_set().tensors[1]
    true = torch.where(torch.from_numpy(wrong), (labels + 1) % 10, labels)
    found = write(
        store,
        page,
        Examples(train_set(), true_labels=true),
        targets=target_set(),
        chosen=[3, 0],
        per_target=4,
        curvature=curvature,
    )
    each = [store.self_influence([m], curvature=curvature) for m in store.model_ids]
    shown = content(page)
    assert [s["index"] for s in shown["samples"]] == np.argsort(-suspicion).tolist()
    for sample in shown["samples"]:
        i = sample["index"]
        assert sample["value"] == pytest.approx(suspicion[i], rel=1e-3)
        assert sample["across"] == pytest.approx([one[i] for one in each], rel=1e-3)
        assert sample["label"] == str(int(labels[i]))
        assert (sample["truth"] != sample["label"]) == wrong[i]
    scores = store.attribute(
        loader(target_set()), model=mlp_of(store), curvature=curvature, progress=False
    )
    for target, number in zip(shown["targets"], [3, 0], strict=True):
        column = scores[:, number]
        assert target["index"] == number
        assert target["label"] == str(int(target_set()[number][1]))
        assert [s["index"] for s in target["helpful"]] == np.argsort(-column)[:4].tolist()
        assert [s["index"] for s in target["harmful"]] == np.argsort(column)[:4].tolist()
        for part in [*target["helpful"], *target["harmful"]]:
            assert part["value"] == pytest.approx(column[part["index"]], rel=2e-3)
            assert np.mean(part["across"]) == pytest.approx(part["value"], rel=2e-3)
    assert found["suspects"] == np.argsort(-suspicion)[:100].tolist()
    assert found["wrong"] == 20
    assert found["auc"] == metrics.mislabel_auc(suspicion, wrong) == 1
    assert found["bytes"] == page.stat().st_size < 1e6
    assert found["warnings"] == []


def test_the_spectrum_is_of_the_matrix_that_scores_invert(store: AttributionStore) -> None:
    computer = td.DampedScoreComputer(device="cpu")
    m = store.model_ids[0]
    x = np.array(store.file(m, "grads").rows(), np.float64)
    q = np.abs(np.array(store.file(m, "out_to_loss").rows(), np.float64)[:, 0])
    for curvature, weight in (
        ("output", np.ones(len(x))),
        ("loss", q / np.linalg.norm(x, axis=1)),
    ):
        gram = (x * weight[:, None]).T @ x
        gram *= (x**2).sum() / gram.trace()
        state = look_at(store, computer, [m], curvature)[0]
        assert state.spectrum is not None
        expected = np.linalg.eigvalsh(gram)[::-1]
        tolerance = 1e-3 * expected[0]  # the smallest q are raised
        np.testing.assert_allclose(state.spectrum.eigenvalues, expected, atol=tolerance)


def mlp_of(store: AttributionStore) -> Classifier:
    return Classifier(mlp())


def test_shows_every_checkpoint_whether_complete_or_not(tmp_path: Path) -> None:
    model = mlp()
    states = checkpoints(model, 2)
    traker, _ = quickstart(model, states, tmp_path / "t", **td.plugin(model, 512))
    done = np.lib.format.open_memmap(tmp_path / "t/1/_is_featurized.mmap", "r+")
    done[7:] = 0
    done.flush()
    (tmp_path / "t/id_1.json").write_text('{"1": {"is_featurized": 0, "is_finalized": 0}}')
    found = write(traker, tmp_path / "report.html")
    assert found["checkpoints"] == [0]
    assert "Checkpoint 1 (checkpoint 1) is not complete, 7 of 300 samples" in found["warnings"][0]
    assert "7 of 300 samples" in (tmp_path / "report.html").read_text()
    assert found["targets"] == 8  # of the only experiment, without their data
    assert "<dt>scheme</dt><dd>dropout</dd>" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("proj_dim", [64, 512])
def test_plain_trak_results_are_reported(tmp_path: Path, proj_dim: int) -> None:
    model = mlp()
    options = td.plugin(model, proj_dim) | {"use_half_precision": False}
    _, scores = quickstart(model, checkpoints(model, 2), tmp_path / "t", **options)
    (tmp_path / "t/manifest.json").unlink()
    assert main(["report", str(tmp_path / "t"), "--out", str(tmp_path / "r.html")]) == 0
    for target in content(tmp_path / "r.html")["targets"]:
        column = scores[:, target["index"]]
        for part in [*target["helpful"], *target["harmful"]]:
            assert part["value"] == pytest.approx(column[part["index"]], rel=2e-3, abs=1e-6)
            assert np.mean(part["across"]) == pytest.approx(part["value"], rel=2e-3, abs=1e-6)


def test_hostile_content_is_text(store: AttributionStore, tmp_path: Path) -> None:
    page = tmp_path / "report.html"

    def render(number: int) -> Any:
        if number == 0:
            return {HOSTILE: HOSTILE, 1: 2}
        if number == 1:
            raise ValueError(HOSTILE)
        if number == 2:
            return torch.full((3, 8, 8), float("nan"))
        return HOSTILE + "x" * 1_000_000 + "\ud800\u202e\x00"

    write(
        store,
        page,
        Examples(
            list(range(300)),
            labels=[HOSTILE] * 300,
            true_labels=["x", *[HOSTILE] * 299],
            render=render,
        ),
        title=HOSTILE,
        summary=HOSTILE,
        compare={HOSTILE: np.zeros(300), "$x_": np.ones(300)},
        table=Table(HOSTILE, [HOSTILE], [[HOSTILE]], HOSTILE),
    )
    text = page.read_text()
    assert HOSTILE not in text
    assert text.count("<script") == 2
    assert "<img" not in text
    assert len(text) < 2e6
    samples = {s["index"]: s for s in content(page)["samples"]}
    assert samples[0]["fields"] == [[clipped(HOSTILE, 80), HOSTILE], ["1", "2"]]
    assert samples[1]["problem"] == f"cannot be shown: ValueError: {HOSTILE}"
    assert "NaN" in samples[2]["problem"]
    assert samples[3]["text"].startswith(HOSTILE)
    assert samples[3]["text"].endswith("more characters)")


def test_fetches_nothing_and_runs_only_its_own_script(
    store: AttributionStore, tmp_path: Path
) -> None:
    page = tmp_path / "report.html"
    write(store, page, train_set(), targets=target_set())
    text = page.read_text()
    addresses = re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?([^"\')\s>]+)', text)
    assert addresses
    assert all(address.startswith(("data:", "#")) for address in addresses)
    policy = html.unescape(re.search(r'Policy" content="([^"]+)"', text)[1])
    assert "default-src 'none'" in policy
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy


def test_kinds_of_items() -> None:
    image = torch.arange(12.0).view(1, 3, 4) / 11
    gray = np.round(image[0].numpy() * 255).astype(np.uint8)
    picture = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(2, 4, 3))

    class Words:
        def decode(self, ids: list[int]) -> str:
            return " ".join("abcdef"[i] for i in ids)

    ids, mask = torch.tensor([1, 2, 0, 0]), torch.tensor([1, 1, 0, 0])
    for item in (image, (image, 3), [image, torch.tensor(3)], {"image": image, "label": 3}):
        assert np.array_equal(shown(item).picture, gray), item
    assert np.array_equal(shown(picture).picture, np.asarray(picture))
    assert np.array_equal(shown(np.asarray(picture)).picture, np.asarray(picture))
    assert shown("text").text == shown((("text"), 1)).text == shown({"text": "text"}).text == "text"
    for item in ((ids, mask), (ids, torch.zeros_like(ids), mask, torch.tensor(1)),
                 {"input_ids": ids, "attention_mask": mask}):  # fmt: skip
        assert shown(item, Words()).text == "b c"
    assert shown((ids,), Words()).text == "b c a a"
    assert shown(ids).text == "1 2 0 0"
    assert shown(torch.tensor([0.5, 2.0])).fields == {"0": "0.5", "1": "2"}
    assert shown({"age": 3, "name": "x", "label": 1}).fields == {"age": "3", "name": "x"}
    assert shown(object()).text.startswith("<object")
    assert shown(Example(text="own")).text == "own"


def test_labels_and_their_names() -> None:
    pairs = [(torch.zeros(1, 2, 2), 1), (torch.zeros(1, 2, 2), torch.tensor(0))]
    named = Examples(pairs, classes=["cat", "dog"], true_labels=[1, 1])
    assert [named.look(i)[1] for i in range(2)] == [named.label(i) for i in range(2)]
    assert [named.label(i) for i in range(2)] == ["dog", "cat"]
    assert named.wrong.tolist() == [False, True]
    assert Examples(["a"]).label(0) is None
    assert Examples(["a"], labels=np.array([3])).label(0) == "3"
    assert Examples([("a", 7)], classes=["x"]).label(0) == "7"
    assert Examples([("a", -1)], classes=["cat", "dog"]).label(0) == "-1"
    assert Examples([("a", -1)], classes={-1: "none"}).label(0) == "none"


@settings(deadline=None, max_examples=60)
@given(
    hnp.arrays(
        st.sampled_from([np.uint8, np.float32, np.float64, np.int64, np.bool_]),
        hnp.array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=6),
    ),
    st.booleans(),
)
def test_any_array_is_an_image_or_says_why_not(array: np.ndarray, first: bool) -> None:
    try:
        found = pixels(array, first)
    except ValueError:
        return
    assert found.dtype == np.uint8
    assert found.ndim == 2 or found.shape[2] == 3
    assert found.size
    Sheets.of([found])


def test_sheets_hold_every_picture_in_its_place() -> None:
    pictures = [np.full((8, 8), i % 256, np.uint8) for i in range(COLUMNS**2 + 3)]
    pictures[5] = np.full((4, 6, 3), (1, 2, 3), np.uint8)
    sheets = Sheets.of(pictures)
    assert sheets.tile == 8
    assert sheets.pixelated
    assert len(sheets.sheets) == 2
    for i in (0, 1, COLUMNS + 1, COLUMNS**2 - 1, COLUMNS**2 + 2):
        data = base64.b64decode(sheets.sheets[i // COLUMNS**2].partition(",")[2])
        sheet = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        row, column = divmod(i % COLUMNS**2, COLUMNS)
        tile = sheet[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        assert (tile == i % 256).all()


def test_bad_arguments_are_named(
    store: AttributionStore, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "r.html"
    for arguments, words in [
        ({"data": train_set(5)}, "data has 5 samples, the store 300"),
        ({"targets": train_set(5)}, "targets has 5 samples, experiment 'test' has 20"),
        ({"chosen": [20]}, "target 20 of 20"),
        ({"exp_name": "none"}, "known are: test"),
        ({"compare": {"x": np.zeros(3)}}, "compare['x'] must be 300"),
    ]:
        with pytest.raises(ValueError, match=re.escape(words)):
            write(store, out, **arguments)
    with pytest.raises(TypeError, match="give the data set, not its loader"):
        write(store, out, iter([]))
    with pytest.raises(ValueError, match="true_labels: 2 for 1"):
        Examples([1], true_labels=[1, 2])
    assert not out.exists()
    (tmp_path / "own.py").write_text("train = 3\ndef needs(size): ...\ndef none(): ...\n")
    for name, words in [
        ("nothing.here:x", "no module nothing.here"),
        ("own", "give package.module:function"),
        (f"{tmp_path}/none.py:x", "no file"),
        (f"{tmp_path}/own.py:y", "has no y"),
        (f"{tmp_path}/own.py:train", "own.py:train: data must have a length"),
        (f"{tmp_path}/own.py:none", "got NoneType"),
        (f"{tmp_path}/own.py:needs", "without arguments: missing a required argument: 'size'"),
    ]:
        assert main(["report", str(store.save_dir), "--data", name, "--out", str(out)]) == 1
        assert words in capsys.readouterr().err


def test_command_line(
    store: AttributionStore, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "beside.py").write_text("from cases import train_set, target_set\n")
    (tmp_path / "own.py").write_text(
        "import beside\ntest = beside.target_set()\ndef train():\n    return beside.train_set()\n"
        "class Train:\n    def __init__(self):\n        self.data = beside.train_set()\n"
        "    def __len__(self):\n        return len(self.data)\n"
        "    def __getitem__(self, i):\n        return self.data[i]\n"
    )
    out = tmp_path / "sub/report.html"
    arguments = ["report", str(store.save_dir), "--out", str(out), "--json", "--target", "7"]
    arguments += ["--model-ids", "1", "--damping", "0.5", "--curvature", "loss"]
    arguments += ["--data", f"{tmp_path}/own.py:train", "--targets", f"test={tmp_path}/own.py:test"]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["targets"] == 1
    assert found["checkpoints"] == [1]
    suspicion = store.self_influence([1], 0.5, curvature="loss")
    assert found["suspects"][:9] == np.argsort(-suspicion)[:9].tolist()
    assert found["page"] == str(out)
    (target,) = content(out)["targets"]
    assert target["index"] == 7
    assert "sprite" in target
    page, of_a_class = content(out), [text.replace(":train", ":Train") for text in arguments]
    assert main(of_a_class) == 0
    assert content(out) == page
    assert main(["report", str(tmp_path)]) == 1
    assert "holds no store" in capsys.readouterr().err


@pytest.mark.parametrize("damaged", ["x", "[1]", '{"test": {}}'])
def test_damaged_experiments_are_named(
    store: AttributionStore, tmp_path: Path, capsys: pytest.CaptureFixture, damaged: str
) -> None:
    copied = tmp_path / "store"
    shutil.copytree(store.save_dir, copied)
    (copied / "experiments.json").write_text(damaged)
    assert main(["report", str(copied), "--out", str(tmp_path / "r.html")]) == 1
    assert f"{copied}/experiments.json is damaged" in capsys.readouterr().err
    assert main(["score", str(copied), "--experiment", "other"]) == 1
    assert f"{copied}/experiments.json is damaged" in capsys.readouterr().err
    if not damaged.startswith("{"):
        with pytest.raises(IncompleteStoreError, match=r"experiments\.json is damaged"):
            Store(copied).write_targets(0, "other", np.ones((2, 64), np.float32))


def test_checkpoints_of_one_step_are_told_apart(store: AttributionStore, tmp_path: Path) -> None:
    """As Lightning counts them where it does not wrap the optimizer."""
    copied = tmp_path / "store"
    shutil.copytree(store.save_dir, copied)
    manifest = json.loads((copied / "manifest.json").read_text())
    for facts in manifest["model_ids"].values():
        facts["global_step"] = 0
    (copied / "manifest.json").write_text(json.dumps(manifest))
    write(Store(copied), tmp_path / "r.html")
    names = [f"checkpoint {i}" for i in store.model_ids]
    assert content(tmp_path / "r.html")["checkpoints"] == names
    (told,) = set(re.findall(r"Directions that count: (.*?)\.", (tmp_path / "r.html").read_text()))
    assert len(names) > 1
    assert all(f"at {name}" in told for name in names)


def test_a_single_sample_and_a_title_of_odd_bytes(tmp_path: Path) -> None:
    model = mlp()
    options = {"n_train": 1, "n_targets": 2, **td.plugin(model, 32)}
    traker, _ = quickstart(model, checkpoints(model, 2), tmp_path / "s", **options)
    out = tmp_path / "r.html"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write(traker, out, title="caf\udce9")  # as the command line hands over Latin-1
    page = out.read_text()
    assert '<h1 dir="auto">caf?</h1>' in page
    assert not re.search(r"\bnan\b", re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL))
