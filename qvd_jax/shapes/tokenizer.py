"""The word tokenizer of the moving shapes' grammar."""

from typing import Any

from qvd_jax.shapes.prompts import words


def make_tokenizer() -> Any:
    """A tokenizer of transformers that knows the grammar's words and marks all others unknown.

    Like CLIP's it puts a start and an end around the text and pads with the end.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    start, end, unknown = "<|startoftext|>", "<|endoftext|>", "<|unknown|>"
    known = (start, end, unknown, *words())
    vocabulary = {word: i for i, word in enumerate(known)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}",
        special_tokens=[(start, vocabulary[start]), (end, vocabulary[end])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=start,
        eos_token=end,
        unk_token=unknown,
        pad_token=end,
    )
