"""Write small sources of each kind, for the tests of this folder."""

from __future__ import annotations

import io
import json
import tarfile

import pytest


def write_tokens(tmp_path, *lines, encoding="utf-8", end="\n"):
    path = tmp_path / "captions.token"
    path.write_bytes("".join(line + end for line in lines).encode(encoding))
    return path


def write_value(tmp_path, value, name="captions.json"):
    path = tmp_path / name
    path.write_text(json.dumps(value))
    return path


def coco_json(images, notes):
    return {
        "info": {},
        "images": [{"id": number, "file_name": name} for number, name in images],
        "annotations": [{"id": k, "image_id": number, "caption": text} for k, (number, text) in enumerate(notes)],
    }


def karpathy_json(*rows):
    return {"images": [{"filename": f, "split": s, "sentences": [{"raw": f"a {f}"}], **more} for f, s, more in rows]}


def raises_one_line(kind, match, call):
    with pytest.raises(kind, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)


def write_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            if content is None:
                member.type, member.linkname = tarfile.SYMTYPE, "/etc/hostname"
            else:
                member.size = len(content)
            tar.addfile(member, io.BytesIO(content or b""))
    return path


def write_img2dataset(folder, tar, samples, stats=None):
    members = {}
    for key, caption in samples.items():
        members[f"{key}.jpg"] = f"image {key}".encode()
        members[f"{key}.json"] = json.dumps({"caption": "of the json", "key": key, "width": 5}).encode()
        members[f"{key}.txt"] = caption.encode()
    write_tar(folder / tar, members)
    if stats is not None:
        (folder / tar.replace(".tar", "_stats.json")).write_text(json.dumps({"count": 9, "successes": stats}))
