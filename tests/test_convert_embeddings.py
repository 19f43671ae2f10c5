"""Textual inversions from files become the same tokens as diffusers makes of them."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AnimateDiffPipeline
from parity import relative_error
from pytorch_sources import edit_json
from safetensors.torch import save_file

import qvd_jax
from convert.__main__ import main as convert
from convert.embeddings import open_embedding, parse_embedding
from qvd_jax.errors import InputError

VECTORS = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
A1111 = {"string_to_token": {"*": 265}, "name": "<dog>", "step": 499, "sd_checkpoint": "4c86efd0",
         "sd_checkpoint_name": "model"}  # fmt: skip
PARAMETERS = torch.nn.ParameterDict({"*": torch.nn.Parameter(VECTORS)})
FILES = {
    "diffusers.bin": {"<dog>": VECTORS[0]},
    "diffusers.safetensors": {"<dog>": VECTORS},
    "a1111.pt": {**A1111, "string_to_param": {"*": torch.nn.Parameter(VECTORS.half())}},
    "<dog>.safetensors": {"emb_params": VECTORS},
    "original.pt": {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": PARAMETERS},
    "alone.pt": VECTORS[1],
}


def write(folder: Path, name: str) -> Path:
    content = FILES[name]
    if name.endswith(".safetensors"):
        save_file(content, folder / name)
    else:
        torch.save(content, folder / name)
    return folder / name


@pytest.mark.parametrize("name", FILES)
def test_every_form_of_file_is_what_diffusers_reads(tiny, tmp_path, name):
    path = write(tmp_path, name)
    token = "<dog>"
    given = None if "dog" in str(FILES[name]) or "dog" in name else token
    theirs = AnimateDiffPipeline.from_pretrained(tiny[0])
    content = {"<dog>": VECTORS} if name == "original.pt" else str(path)
    # Where a file does not name its token diffusers is to be told it.
    theirs.load_textual_inversion(content, token=token if name != "diffusers.bin" else None)
    found = open_embedding(path, given)
    ids = theirs.tokenizer.convert_tokens_to_ids(found.tokens)
    assert ids == list(range(190, 190 + len(found.vectors)))
    table = theirs.text_encoder.get_input_embeddings().weight.detach().numpy()
    np.testing.assert_array_equal(found.vectors, table[ids])


def test_a_folder_and_names_with_colons(tmp_path):
    (tmp_path / "learned").mkdir()
    torch.save({"<dog>": VECTORS}, tmp_path / "learned" / "learned_embeds.bin")
    assert open_embedding(tmp_path / "learned").tokens == ["<dog>", "<dog>_1", "<dog>_2"]
    odd = tmp_path / "a:b.pt"
    odd.touch()
    assert parse_embedding(str(odd)) == (odd, None)
    assert parse_embedding(f"{odd}:<x:y>") == (odd, "<x:y>")
    assert parse_embedding("none.pt:c") == (Path("none.pt:c"), None)


def test_converted_tokens_are_embedded_as_in_diffusers(tiny, tmp_path, capsys):
    several, single = write(tmp_path, "diffusers.safetensors"), write(tmp_path, "alone.pt")
    options = ["--embedding", str(several), "--embedding", f"{single}:zebra"]
    assert convert([str(tiny[0]), *options, "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "note: diffusers.safetensors is the token '<dog>' of 3 vectors" in shown
    assert "note: alone.pt is the token 'zebra' of 1 vector\n" in shown
    theirs = AnimateDiffPipeline.from_pretrained(tiny[0])
    theirs.load_textual_inversion({"<dog>": VECTORS}, token="<dog>")
    theirs.load_textual_inversion({"zebra": VECTORS[1]}, token="zebra")
    ours = qvd_jax.load(tmp_path / "out")
    qvd_jax.save(ours, tmp_path / "again")
    for prompt in ("a <dog>, b", "zebra <dog> zebra", "plain"):
        with torch.no_grad():
            expected, _ = theirs.encode_prompt(prompt, "cpu", 1, False)
        assert relative_error(ours.encode_text([prompt]), expected) <= 1e-5
        again = qvd_jax.load(tmp_path / "again").encode_text([prompt])
        np.testing.assert_array_equal(again, ours.encode_text([prompt]))


def test_tokens_of_older_tokenizer_files_are_kept(tiny, tmp_path):
    """Before transformers 5 they were in added_tokens.json, often without a tokenizer.json."""
    source = tmp_path / "source"
    theirs = AnimateDiffPipeline.from_pretrained(tiny[0])
    theirs.load_textual_inversion({"<dog>": VECTORS}, token="<dog>")
    theirs.save_pretrained(source)
    tokens = {"<dog>": 190, "<dog>_1": 191, "<dog>_2": 192}
    (source / "tokenizer" / "tokenizer.json").unlink()
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(tiny[0] / "tokenizer" / name, source / "tokenizer")
    (source / "tokenizer" / "added_tokens.json").write_text(json.dumps(tokens))
    edit_json(source / "tokenizer" / "tokenizer_config.json", added_tokens_decoder={
        str(number): {"content": token, "lstrip": False, "normalized": True, "rstrip": False,
                      "single_word": False, "special": False}
        for token, number in tokens.items()
    })  # fmt: skip
    assert convert([str(source), "--out", str(tmp_path / "out")]) == 0
    with torch.no_grad():
        expected, _ = theirs.encode_prompt("a <dog>", "cpu", 1, False)
    found = qvd_jax.load(tmp_path / "out").encode_text(["a <dog>"])
    assert relative_error(found, expected) <= 1e-5


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ({"<dog>": torch.zeros(768)}, "a.pt", "the embedding is 768 wide, .* tokens are 24 wide"),
        ({"<dog>": torch.zeros(2, 3, 24)}, "a.pt", r"the embedding has the shape .*2, 3, 24"),
        ({"<dog>": torch.full((24,), torch.nan)}, "a.pt", "the embedding is not finite"),
        ({"<dog>": torch.zeros(24), "b": torch.zeros(24)}, "a.pt", "holds <dog>, b; one embedding"),
        ({"clip_l": torch.zeros(1, 24), "clip_g": torch.zeros(1, 24)}, "a.pt", "Diffusion XL"),
        ({"a</w>": torch.zeros(24)}, "a.pt", "has a token 'a</w>' already; give another name"),
        ({"<dog>": "text"}, "a.pt", "'<dog>' is a str, no tensor"),
        ([1], "a.pt", "holds a list, no embedding"),
        ({"a": Path}, "a.pt", "'a' is a type, no tensor"),
        ({"a": torch.nn.Linear}, "a.pt", r"a.pt is refused: .*\(torch.nn.modules.linear.Linear\)"),
        (b"torn", "a.safetensors", "a.safetensors is truncated or no safetensors file"),
        (b"", "a.png", "embeddings are read from .safetensors, .bin"),
        (None, "a.pt", "a.pt does not exist; an embedding"),
    ],
)
def test_other_files_are_refused(tiny, tmp_path, capsys, content, name, message):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content is not None:
        torch.save(content, tmp_path / name)
    arguments = ["--embedding", str(tmp_path / name), "--out", str(tmp_path / "out")]
    assert convert([str(tiny[0]), *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert re.search(message, error)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_another_text_encoder_is_refused(tiny, tiny_checkpoint, tmp_path, capsys):
    for source, command in (
        (tiny[0], lambda path: convert([str(path), "--out", str(tmp_path / "out")])),
        (tiny_checkpoint, None),
    ):
        path = tmp_path / source.parent.name
        shutil.copytree(source, path)
        theirs = AnimateDiffPipeline.from_pretrained(tiny[0]).tokenizer
        theirs.add_tokens("<dog>")
        theirs.save_pretrained(path / "tokenizer")
        message = "the tokenizer knows '<dog>' as token 190, the text encoder has 190 tokens"
        if command:
            assert command(path) == 2
            assert message in capsys.readouterr().err
        else:
            with pytest.raises(InputError, match=message):
                qvd_jax.load(path)
