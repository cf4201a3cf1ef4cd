from __future__ import annotations

import json

import pytest

from nbdserve.cli.output import Output, print_json


def test_json_is_laid_out_as_qemu_img_does(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"filename": "ä", "sizes": [1]})
    printed = capsys.readouterr().out
    assert printed == '{\n    "filename": "ä",\n    "sizes": [\n        1\n    ]\n}\n'
    assert json.loads(printed) == {"filename": "ä", "sizes": [1]}


def test_the_names_of_the_forms() -> None:
    assert [str(output) for output in Output] == ["human", "json"]
