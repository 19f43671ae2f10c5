"""Prompts with added tokens, too long ones, and embeddings in their place, as in diffusers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AnimateDiffPipeline
from parity import relative_error
from safetensors.numpy import save_file

import qvd_jax
from convert.__main__ import main as convert
from qvd_jax import sample
from qvd_jax.errors import InputError
from qvd_jax.pipelines.text_to_video import TextToVideoPipeline

TWO = "{tmp}/two.npy"
LONG = "a b c d e f g h i j k l m n o p q r s t"
SIZE = {"frames": 2, "height": 8, "width": 12}
SMALL = ["--frames", "2", "--height", "8", "--width", "12", "--steps", "1"]


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint) -> TextToVideoPipeline:
    return qvd_jax.load(tiny_checkpoint)


@pytest.fixture(scope="module")
def inverted(tiny, tmp_path_factory) -> tuple[AnimateDiffPipeline, TextToVideoPipeline]:
    """Textual inversions of one, two and twelve vectors, saved with the pipeline and converted."""
    root = tmp_path_factory.mktemp("inverted")
    theirs = AnimateDiffPipeline.from_pretrained(tiny[0])
    for i, (token, count) in enumerate({"<cat>": 1, "frog": 2, "<sky>": 12, "Bee": 2}.items()):
        vectors = torch.randn(count, 24, generator=torch.Generator().manual_seed(i))
        theirs.load_textual_inversion({token: vectors}, token=token)
    theirs.save_pretrained(root / "diffusers")
    assert convert([str(root / "diffusers"), "--out", str(root / "out")]) == 0
    return theirs, qvd_jax.load(root / "out")


@pytest.mark.parametrize(
    "prompt",
    ["a <cat> b", "frog", "x frog, <cat> frog", "<CAT> Frogs", "<sky>", "<sky>_3 y", "plain"],
)
def test_added_tokens_are_embedded_as_in_diffusers(inverted, prompt):
    theirs, ours = inverted
    with torch.no_grad():
        expected, _ = theirs.encode_prompt(prompt, "cpu", 1, False)
    assert relative_error(ours.encode_text([prompt]), expected) <= 1e-5


def test_a_token_whose_vectors_diffusers_does_not_find_is_named(inverted, caplog):
    theirs, ours = inverted
    found = ours.encode_text(["a Bee"])
    assert "of the vectors of 'Bee' only the first is used" in caplog.text
    with torch.no_grad():
        expected, _ = theirs.encode_prompt("a Bee", "cpu", 1, False)
    assert relative_error(found, expected) <= 1e-5


def test_the_words_that_are_cut_are_named(pipe, inverted, caplog):
    # 14 of 16 tokens are the prompt's own.
    pipe.encode_text(["a", LONG, "b"])
    # Of a word of many tokens the end is cut; the vectors of one token are tokens each.
    pipe.encode_text(["a b c d e f g h i abcdefg"])
    inverted[1].encode_text(["a a a a <sky> b c"])
    pipe.encode_text([LONG[:27]])
    cut = [message.partition("left out: ")[2] for message in caplog.messages]
    assert cut == ["'o p q r s t'", "'fg'", "'<sky>_10 <sky>_11 b c'"]


def test_the_tokenizer_may_be_shorter_than_the_encoder(tiny, pipe):
    """diffusers pads to the tokenizer's length."""
    theirs = AnimateDiffPipeline.from_pretrained(tiny[0])
    theirs.tokenizer.model_max_length = pipe.tokenizer.model_max_length = 9
    try:
        with torch.no_grad():
            expected, _ = theirs.encode_prompt("a b", "cpu", 1, False)
        assert pipe.context_length == 9
        assert relative_error(pipe.encode_text(["a b"]), expected) <= 1e-5
    finally:
        pipe.tokenizer.model_max_length = 16


def test_the_command_names_cut_words_once(tiny_checkpoint, tmp_path, monkeypatch, capsys):

    def without_sampling(pipe, request, batch, *_):
        pipe.encode_text(request.inputs.take(batch).values)
        return np.zeros((len(batch), 2, 8, 12, 3), np.uint8), {}

    monkeypatch.setattr(sample, "sample", without_sampling)
    (tmp_path / "prompts.txt").write_text(f"short\n{LONG}\n")
    arguments = ["--prompts-file", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "a.gif")]
    arguments += ["--negative-prompt", LONG[::-1]]
    assert sample.main(["--checkpoint", str(tiny_checkpoint), *SMALL, *arguments]) == 0
    captured = capsys.readouterr()
    notes = [line for line in captured.out.splitlines() if " is cut, " in line]
    assert [note.rpartition(": ")[2] for note in notes] == ["'o p q r s t'", "'f e d c b a'"]
    assert "indexing errors" not in captured.out + captured.err


def embeds(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal((*shape, 24), dtype=np.float32)


@pytest.mark.parametrize("length", [9, 16, 20])
@pytest.mark.parametrize("negative", ["embeds", "prompt", None])
def test_embeddings_take_the_place_of_prompts_as_in_diffusers(tiny, pipe, length, negative):
    """What the UNet is told; test_pipeline holds what it makes of it."""
    given = embeds(1, length)
    negatives = {"embeds": {"negative_prompt_embeds": embeds(1, length) + 1},
                 "prompt": {"negative_prompt": "a b"}}.get(negative, {})  # fmt: skip
    ours = {
        "prompt_embeds": given,
        **{name.replace("prompt", "prompts") if name[-1] == "t" else name: value
           for name, value in negatives.items()},
    }  # fmt: skip
    if length > 16 and negative != "embeds":
        with pytest.raises(InputError, match="negative_prompt_embeds of 20 are needed"):
            pipe(**ours, **SIZE)
        return
    tensors = {n: torch.tensor(v) if isinstance(v, np.ndarray) else v for n, v in negatives.items()}
    with torch.no_grad():
        expected, theirs = tiny[1].encode_prompt(
            None, "cpu", 1, True, prompt_embeds=torch.tensor(given), **tensors
        )
    told = []
    with pytest.MonkeyPatch.context() as patch:
        keep = lambda _, __, conditions, *___: told.append(conditions())  # noqa: E731
        patch.setattr(TextToVideoPipeline, "_generate", keep)
        pipe(**ours, **SIZE)
    assert relative_error(told[0].context, torch.cat([theirs, expected])) <= 1e-5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "there are no prompts; prompts or prompt_embeds are needed"),
        ({"prompts": "a", "prompt_embeds": embeds(1, 16)}, "prompt_embeds stand in the place of"),
        (
            {"prompt_embeds": np.zeros((1, 16, 8))},
            r"prompt_embeds: the shape is \(1, 16, 8\), ",
        ),
        ({"prompt_embeds": np.zeros(24)}, r"prompt_embeds: the shape is \(24,\)"),
        ({"prompt_embeds": embeds(1, 16) * np.nan}, "prompt_embeds: not all values are finite"),
        (
            {"prompts": "a", "negative_prompt_embeds": embeds(1, 9)},
            "negative_prompt_embeds of 9 tokens for 16 tokens of the prompts",
        ),
        (
            {"prompts": ["a", "b", "c"], "negative_prompt_embeds": embeds(2, 16)},
            "2 negative prompts for 3 prompts",
        ),
        (
            {"prompts": "a", "negative_prompts": "b", "negative_prompt_embeds": embeds(1, 16)},
            "negative_prompt_embeds stand in the place of 'b'",
        ),
    ],
)
def test_embeddings_that_do_not_fit_are_refused(pipe, given, message):
    with pytest.raises(InputError, match=message):
        pipe(**given, **SIZE)


def test_negative_prompts_without_guidance_are_named(pipe, caplog):
    with pytest.raises(InputError, match="output_type"):
        pipe("a", "b", **SIZE, guidance_scale=1.0, output_type="gif")
    assert "negative prompts have no effect at guidance_scale = 1" in caplog.text


def save_embeds(folder: Path) -> None:
    np.save(folder / "two.npy", embeds(2, 16))
    save_file({"x": embeds(16)}, folder / "one.safetensors")
    save_file({"x": embeds(16), "y": embeds(16)}, folder / "both.safetensors")
    np.save(folder / "wide.npy", np.zeros((16, 768), np.float32))
    np.save(folder / "code.npy", np.array([{}]), allow_pickle=True)
    (folder / "torn.safetensors").write_bytes(b"torn")


def test_the_command_takes_files_of_embeddings(tiny_checkpoint, tmp_path, monkeypatch):
    save_embeds(tmp_path)
    given = []

    def without_sampling(_pipe, request, batch, *_):
        inputs = request.inputs.take(batch)
        assert not inputs.values
        given.append(inputs.options)
        return np.zeros((1, 2, 8, 12, 3), np.uint8), {}

    monkeypatch.setattr(sample, "sample", without_sampling)
    arguments = ["--prompt-embeds", str(tmp_path / "two.npy"), "--out", str(tmp_path / "out")]
    arguments += ["--negative-prompt-embeds", str(tmp_path / "one.safetensors")]
    assert sample.main(["--checkpoint", str(tiny_checkpoint), *SMALL, *arguments]) == 0
    # On one device one video after the other is sampled and written.
    found = np.concatenate([options["prompt_embeds"] for options in given])
    np.testing.assert_array_equal(found, embeds(2, 16))
    for options in given:
        np.testing.assert_array_equal(options["negative_prompt_embeds"], embeds(16)[None])
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == [f"00{i}-two-{i}.{kind}" for i in range(2) for kind in ("json", "mp4")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt-embeds", "{tmp}/none.npy"], "none.npy does not exist; an .npy or"),
        (["--prompt-embeds", "{tmp}/a.pt"], "a.pt: arrays are read from .npy and .safetensors"),
        (
            ["--prompt-embeds", "{tmp}/wide.npy"],
            "wide.npy: the shape is (16, 768), (videos",
        ),
        (["--prompt-embeds", "{tmp}/code.npy"], "code.npy is damaged: Object arrays cannot be"),
        (["--prompt-embeds", "{tmp}/torn.safetensors"], "torn.safetensors is damaged"),
        (
            ["--prompt-embeds", "{tmp}/both.safetensors"],
            "both.safetensors holds x, y; one array",
        ),
        (["--prompt-embeds", TWO, "--prompt", "a"], "stand in the place of prompts"),
        (
            ["--prompt", "a", "b", "c", "--negative-prompt-embeds", TWO],
            "--negative-prompt-embeds holds 2 for 3 videos: one, or one for each is needed",
        ),
        (
            ["--prompt-embeds", "{tmp}/one.safetensors", "--negative-prompt-embeds", TWO],
            "--negative-prompt-embeds holds 2 for 1 videos",
        ),
        (
            [
                "--prompt",
                "a",
                "--negative-prompt",
                "b",
                "--negative-prompt-embeds",
                "{tmp}/two.npy",
            ],
            "--negative-prompt-embeds stand in the place of --negative-prompt",
        ),
    ],
)
def test_bad_embedding_files_are_one_line(tiny_checkpoint, tmp_path, capsys, arguments, message):
    save_embeds(tmp_path)
    (tmp_path / "a.pt").write_bytes(b"")
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    out = ["--out", str(tmp_path / "out.gif")]
    assert sample.main(["--checkpoint", str(tiny_checkpoint), *SMALL, *arguments, *out]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "out.gif").exists()
