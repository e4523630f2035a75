"""`ligature index` ends with the same bytes however often it is killed; `ligature search` answers from it and refuses in one line."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import signal

import index_jobs
import numpy as np
import pytest
import torch
from PIL import Image

import runtime.files
from data_tools.pixels.decode import upright
from finetune.heads.config import VLDeformerConfig
from finetune.heads.decomposed import LoadedVLDeformer
from finetune.search import indexing
from launch.cli import main
from pretrain.weights.load import describe_model, load_model
from retrieval.index import Index
from runtime.checkpoint import write_checkpoint

IMAGES = 112
"""Images in the source folder of `drawn`."""


def settings(pretrained, data, out, **more) -> dict:
    small_parts = {"part_images": 16, "batch_size": 8, "workers": 0, "device": "cpu"}
    return {"checkpoint": str(pretrained), "data": str(data), "out": str(out), **small_parts, **more}


def options(settings: dict) -> list[str]:
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def contents(folder) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def photos(drawn, tmp_path_factory):
    """The drawn pictures in folders, beside two broken files."""
    folder = tmp_path_factory.mktemp("photos") / "all"
    shutil.copytree(drawn / "source" / "images", folder / "drawn")
    (folder / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut short")
    (folder / "drawn" / "empty.png").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def made(pretrained, photos, tmp_path_factory):
    """An index of the photos, made without interruption."""
    out = tmp_path_factory.mktemp("made") / "index"
    assert main(["index", *options(settings(pretrained, photos, out))]) == 0
    return out


@pytest.fixture
def answer(capsys):
    """answer(*arguments) -> (exit code, the line on stderr)."""

    def ask(*arguments) -> tuple[int, str]:
        code = main([str(argument) for argument in arguments])
        lines = [line for line in capsys.readouterr().err.splitlines(True) if not line.startswith("indexing: ")]
        assert len(lines) == 1 and lines[0].startswith("ligature: "), lines
        return code, lines[0]

    return ask


def test_vectors_are_the_models_own(made, photos, pretrained):
    index, model = Index(made), load_model(pretrained)
    assert len(index) == IMAGES and index.about["images"] == IMAGES + 2
    images = index.images(np.array([0, 57, IMAGES - 1]))
    pictures = [Image.open(photos / image["name"]) for image in images]
    expected = model.encode_image([upright(picture) for picture in pictures])
    torch.testing.assert_close(
        torch.tensor(np.asarray(index.vectors[[0, 57, IMAGES - 1]])), expected, atol=1e-6, rtol=0
    )


def test_broken_images_are_listed_and_the_rest_indexed(made, pretrained, photos, tmp_path, capsys):
    lines = [json.loads(line) for line in (made / "broken.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == ["cut.jpg", "drawn/empty.png"] and all(line["reason"] for line in lines)
    assert main(["index", *options(settings(pretrained, photos, made))]) == 0
    assert "2 cannot be read" in capsys.readouterr().out


def killed_at(moment: str, count: int, recipe: dict) -> None:
    """Index in a child process that is killed, as by kill -9, when `moment` comes for the count-th time."""
    child = os.fork()
    if child:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, f"{moment} {count} never came"
        return
    try:
        calls = 0

        def kill_at_call(function, before):
            def call(*arguments, **more):
                nonlocal calls
                calls += 1
                if calls == count and before:
                    os.kill(os.getpid(), signal.SIGKILL)
                result = function(*arguments, **more)
                if calls == count:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            return call

        name = {"part": "rename", "file": "replace"}[moment.split()[1]]
        setattr(runtime.files.os, name, kill_at_call(getattr(os, name), moment.startswith("before")))
        index_jobs.make_index(recipe)
    finally:
        os._exit(1)


# A part is renamed eight times; files are replaced in this order: files.json, plan.json, embeddings, images, broken, index.json.
MOMENTS = [
    [("after file", 1)],
    [("before part", 1), ("after part", 2), ("before part", 3)],
    [("after part", 8), ("before file", 1)],
    [("after file", 3), ("before file", 3)],
    [("before file", 6), ("after file", 4)],
]


@pytest.mark.parametrize("kills", MOMENTS, ids=str)
def test_a_killed_index_goes_on_to_the_same_bytes(made, photos, pretrained, tmp_path, monkeypatch, kills):
    out, recipe, written = tmp_path / "index", settings(pretrained, photos, tmp_path / "index"), []
    for moment, count in kills:
        killed_at(moment, count, recipe)
    assert (out / "index.json").exists() == (kills == MOMENTS[4])
    committed = len(list(out.glob("parts/part-????????")))
    write = indexing.write_part
    monkeypatch.setattr(indexing, "write_part", lambda *arguments: (written.append(arguments[1]), write(*arguments)))
    index_jobs.make_index(recipe)
    assert contents(out) == contents(made)
    assert len(written) == (0 if kills == MOMENTS[4] else 8 - committed)  # committed parts are not encoded again


def test_two_ranks_make_the_bytes_of_one(gloo_pool, made, photos, pretrained, tmp_path):
    gloo_pool.run(index_jobs.make_index, settings(pretrained, photos, tmp_path / "index"))
    assert contents(tmp_path / "index") == contents(made)


def test_files_added_while_an_index_is_made_are_left_out(made, photos, pretrained, tmp_path):
    recipe = settings(pretrained, photos, tmp_path / "index")
    killed_at("after part", 3, recipe)
    late = photos / "a.png"
    try:
        shutil.copy(next((photos / "drawn").glob("train*.png")), late)
        index_jobs.make_index(recipe)
    finally:
        late.unlink()
    assert contents(tmp_path / "index") == contents(made)


def test_an_index_with_other_settings_is_not_resumed(answer, photos, pretrained, drawn, tmp_path):
    recipe = settings(pretrained, photos, tmp_path / "index")
    killed_at("after part", 1, recipe)
    code, line = answer("index", *options(recipe | {"batch_size": 4}))
    assert code == 2 and "batch_size is 4, it was begun with 8" in line
    code, line = answer("index", *options(recipe | {"precision": "tf32"}))
    assert code == 2 and "precision is tf32, which a GPU computes in, and this runs on the cpu" in line
    code, line = answer("index", *options(recipe | {"data": drawn / "test"}))
    assert code == 2 and f"begun on {photos}" in line
    assert answer("search", "a", "--index", tmp_path / "index") == (
        1,
        f"ligature: the index {tmp_path / 'index'} is not finished; the same `ligature index` goes on where it stopped\n",
    )


def test_an_index_is_locked_while_it_is_made(answer, photos, pretrained, tmp_path):
    (tmp_path / "index").mkdir()
    descriptor = os.open(tmp_path / "index", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    code, line = answer("index", *options(settings(pretrained, photos, tmp_path / "index")))
    os.close(descriptor)
    assert code == 1 and "another `ligature index`" in line


def test_an_index_that_cannot_be_made_is_refused(answer, made, photos, pretrained, other, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    code, line = answer("index", *options(settings(pretrained, photos, tmp_path / "full")))
    assert code == 1 and "holds other files" in line
    (tmp_path / "photos").mkdir()
    code, line = answer("index", *options(settings(pretrained, tmp_path / "photos", tmp_path / "index")))
    assert code == 1 and "holds no images" in line and not (tmp_path / "index").exists()
    (tmp_path / "photos" / "a.png").write_bytes(b"no png")
    code, line = answer("index", *options(settings(pretrained, tmp_path / "photos", tmp_path / "index")))
    assert code == 1 and "none of the 1 images" in line and "a.png" in line and not (tmp_path / "index").exists()
    code, line = answer("index", *options(settings(tmp_path / "gone", photos, tmp_path / "index2")))
    assert code == 1 and "no such folder" in line
    code, line = answer("index", *options(settings(other, photos, made)))
    assert code == 1 and f"was made by checkpoint {Index(made).about['checkpoint']}" in line
    code, line = answer("index", *options(settings(pretrained, tmp_path / "photos", made)))
    assert code == 1 and f"is of the images of {photos}, not of" in line
    (photos / "new.png").write_bytes(b"a photo that came later")
    code, line = answer("index", *options(settings(pretrained, photos, made)))
    (photos / "new.png").unlink()
    assert code == 1 and f"is of other images than {photos} holds now" in line
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    code, line = answer("index", *options(settings(pretrained, photos, made) | {"queries": tmp_path / "latin.txt"}))
    assert code == 2 and "no text (UTF-8)" in line


def test_a_head_without_vectors_is_refused_with_its_reason(answer, photos, pretrained, tmp_path):
    shutil.copytree(load_model(pretrained).folder, tmp_path / "hat")
    about = json.loads((tmp_path / "hat" / "model.json").read_text())
    (tmp_path / "hat" / "model.json").write_text(json.dumps(about | {"head": "hat"}))
    code, line = answer("index", *options(settings(tmp_path / "hat", photos, tmp_path / "index")))
    assert code == 1 and "holds a hat head" in line and "an image has no vector of its own" in line


def test_a_vldeformer_is_indexed_by_its_own_embeddings(pretrained, photos, tmp_path, capsys):
    start = LoadedVLDeformer(pretrained)
    config = load_model(pretrained).network.config
    about = describe_model(config, start.tokenizer.caption_tokens, "fine-tuned-on shapes")
    about |= {"head": "vldeformer", "vldeformer": dataclasses.asdict(VLDeformerConfig())}
    save = start.tokenizer.save
    write_checkpoint(tmp_path / "tuned", {"model": start.model.state_dict()}, {"model": about}, save)
    assert main(["index", *options(settings(tmp_path / "tuned", photos, tmp_path / "index"))]) == 0
    tuned, index = LoadedVLDeformer(tmp_path / "tuned"), Index(tmp_path / "index")
    picture = upright(Image.open(photos / index.images(np.array([5]))[0]["name"]))
    torch.testing.assert_close(torch.tensor(np.array(index.vectors[5])), tuned.encode_image([picture])[0])
    (result,) = results(capsys, "a red circle", "--index", tmp_path / "index", "--top", 1)
    scores = np.asarray(index.vectors) @ tuned.encode_text(["a red circle"])[0].numpy()
    assert result["results"][0]["score"] == pytest.approx(float(scores.max()), abs=1e-6)


@pytest.fixture(scope="module")
def other(pretrained, tmp_path_factory):
    """Another checkpoint of the same shape."""
    model = load_model(pretrained)
    out = tmp_path_factory.mktemp("other") / "model"
    about = describe_model(model.network.config, model.tokenizer.caption_tokens, "pretrained")
    weights = {name: weight + 0.1 for name, weight in model.network.named_parameters()}
    write_checkpoint(out, {"model": weights}, {"model": about}, model.tokenizer.save)
    return out


def results(capsys, *arguments) -> list[dict]:
    capsys.readouterr()
    assert main(["search", *map(str, arguments), "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_words_find_the_images_with_the_highest_cosines(made, pretrained, capsys, tmp_path):
    (tmp_path / "more.txt").write_text("two blue squares\n")
    answers = results(capsys, "a red circle", "--index", made, "--top", 7, "--queries", tmp_path / "more.txt")
    assert [answer["query"] for answer in answers] == ["a red circle", "two blue squares"]
    vectors = np.asarray(Index(made).vectors, np.float64)
    for answer in answers:
        query = load_model(pretrained).encode_text([answer["query"]])[0].double().numpy()
        order = np.argsort(-(vectors @ query), kind="stable")[:7]
        assert [hit["number"] for hit in answer["results"]] == [row["number"] for row in Index(made).images(order)]
        assert [hit["score"] for hit in answer["results"]] == pytest.approx((vectors @ query)[order].tolist(), abs=1e-6)


def test_an_image_finds_itself_first(made, photos, capsys):
    name = Index(made).images(np.array([40]))[0]["name"]
    (answer,) = results(capsys, photos / name, "--index", made, "--top", 3)
    assert answer["kind"] == "image" and answer["results"][0]["score"] == pytest.approx(1, abs=1e-5)
    same = [hit["name"] for hit in answer["results"] if hit["score"] > 1 - 1e-5]
    assert name in same


def test_a_shard_folders_captions_come_along(pretrained, drawn, tmp_path, capsys):
    out, page = tmp_path / "index", tmp_path / "page.html"
    assert main(["index", *options(settings(pretrained, drawn / "test", out))]) == 0
    assert main(["search", "a <b>red</b> circle", "--index", str(out), "--top", "3", "--html", str(page)]) == 0
    images = Index(out).images(np.arange(24))
    assert all(image["captions"] for image in images)
    shown = page.read_text()
    assert shown.count('src="data:image/jpeg;base64,') == 3 and "&lt;b&gt;red" in shown and "<b>red" not in shown
    assert "http" not in shown, "it fetches something"
    assert any(image["captions"][0] in shown for image in images)


def test_a_page_without_its_pictures_says_so(made, tmp_path):
    moved = tmp_path / "index"
    shutil.copytree(made, moved)
    about = json.loads((moved / "index.json").read_text())
    about["source"]["place"] = str(tmp_path / "gone")
    (moved / "index.json").write_text(json.dumps(about))
    assert main(["search", "a circle", "--index", str(moved), "--top", "2", "--html", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_text().count("cannot be read") == 2


def test_inverted_lists_are_added_to_a_finished_index(made, pretrained, photos, tmp_path, capsys):
    pytest.importorskip("faiss")
    out = tmp_path / "index"
    shutil.copytree(made, out)
    recipe = settings(pretrained, photos, out, approximate="ivf", recall=0.9)
    assert main(["search", "a circle", "--index", str(out), "--approximate"]) == 1
    assert "no inverted lists" in capsys.readouterr().err
    assert main(["index", *options(recipe)]) == 0
    output = capsys.readouterr().out
    assert "nothing to do" in output and "recall@10 against exact search" in output and "words may find less" in output
    assert main(["index", *options(recipe)]) == 0
    assert "has its inverted lists already; nothing to do" in capsys.readouterr().out
    assert main(["index", *options(recipe | {"recall": 0.99})]) == 0
    assert "has its inverted lists" not in capsys.readouterr().out, "another recall needs other lists"
    with_queries = recipe | {"queries": str(tmp_path / "queries.txt")}
    for words, again in (("a circle\n", False), ("a circle\n", True), ("a square\n", False)):
        (tmp_path / "queries.txt").write_text(words)
        assert main(["index", *options(with_queries)]) == 0
        assert ("has its inverted lists already" in capsys.readouterr().out) is again, "the same name, other words"
    (photos / "new.png").write_bytes(b"a photo that came later")
    try:
        assert main(["index", *options(recipe)]) == 0
    finally:
        (photos / "new.png").unlink()
    assert "has changed since" in capsys.readouterr().out
    assert main(["search", "a circle", "--index", str(out), "--approximate"]) == 0
    assert "approximate search of 112 images; inverted lists" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([""], 2, "the query is empty"),
        (["  \n"], 2, "the query is empty"),
        ([], 2, "nothing to search for"),
        (["dog.jpg"], 2, "no image file dog.jpg"),
        (["a", "--top", "0"], 2, "--top is 0"),
        (["a", "--queries", "none.txt"], 1, "cannot read queries from none.txt"),
        (["a", "--index", "none"], 1, "no index none; make one: ligature index"),
        (["\u65e5\u672c"], 1, "vocabulary has nothing of"),
        (["a", "--checkpoint", "none"], 1, "no such folder"),
        (["a", "--approximate"], 1, "no inverted lists"),
    ],
    ids=str,
)
def test_mistakes_of_a_search_give_a_one_line_error(answer, made, arguments, code, message):
    index = [] if "--index" in arguments else ["--index", made]
    exit_code, line = answer("search", *arguments, *index)
    assert exit_code == code and message in line


def test_an_empty_line_in_a_file_of_queries_is_named(answer, made, tmp_path):
    (tmp_path / "q.txt").write_text("a dog\n\na cat\n")
    code, line = answer("search", "--queries", tmp_path / "q.txt", "--index", made)
    assert code == 2 and "q.txt, line 2: an empty query" in line


def test_an_index_of_another_checkpoint_is_refused(answer, made, other):
    code, line = answer("search", "a circle", "--index", made, "--checkpoint", other)
    assert code == 1 and "do not compare" in line and Index(made).about["checkpoint"] in line


def test_a_checkpoint_that_is_gone_is_asked_for(answer, made, tmp_path):
    moved = tmp_path / "index"
    shutil.copytree(made, moved)
    about = json.loads((moved / "index.json").read_text())
    (moved / "index.json").write_text(json.dumps(about | {"checkpoint_folder": str(tmp_path / "gone")}))
    code, line = answer("search", "a circle", "--index", moved)
    assert code == 1 and "no longer at" in line and about["checkpoint"] in line


def test_unknown_letters_and_long_queries_are_noted(made, capsys):
    assert main(["search", "a \u65e5 circle " + "red " * 40, "--index", str(made)]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ligature: note: ")]
    assert "not read: \u65e5" in notes[0] and "its end is not read" in notes[1]
