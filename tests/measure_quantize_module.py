"""What `quantize_module` makes of flax's own examples: an MLP, a ResNet and a transformer.

    pip download flax==0.12.8 --no-deps --no-binary flax && tar xzf flax-0.12.8.tar.gz
    python tests/measure_quantize_module.py --flax flax-0.12.8 \
        --out docs/results/quantize_module.json

The examples are run as published. Each is trained for a short while on the moving shapes of this
package, for what rounding does to random weights says little of trained ones, then quantized on 16
batches and compared on one it has not seen.
"""

import argparse
import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from timed import write_record

from qvd_jax import quantize_module
from qvd_jax.quant.solve import sqnr
from qvd_jax.shapes.pixels import render_frames
from qvd_jax.shapes.prompts import prompt_of
from qvd_jax.shapes.scenes import scenes_of
from qvd_jax.shapes.tokenizer import make_tokenizer

BATCHES, BATCH = 16, 64


class Example(NamedTuple):
    """A model of flax's examples and what it is trained on.

    Attributes:
      name: for the table.
      place: the example's folder.
      module: of linen.
      batch: the arguments of a call, and what is to come out, drawn by a generator.
      loss: of the output, what is to come out, and the first argument.
      options: of every call when it is used.
      training: of every call in training.
      steps: of the training.
    """

    name: str
    place: str
    module: Any
    batch: Callable[[np.random.Generator], tuple[tuple[Any, ...], Any]]
    loss: Callable[[Any, Any, Any], jax.Array]
    options: dict[str, Any]
    training: dict[str, Any]
    steps: int


def examples(flax: Path) -> list[Example]:
    every = scenes_of("train")

    def scenes(rng):
        return every[rng.integers(len(every), size=BATCH)]

    def digits(rng):
        frames = render_frames(scenes(rng), rng, 28)
        gray = frames.astype(np.float32).mean(-1).reshape(BATCH, -1) / 255
        return (gray, jax.random.key(rng.integers(2**31))), gray

    def pictures(rng):
        chosen = scenes(rng)
        return (render_frames(chosen, rng).astype(np.float32) / 127.5 - 1,), chosen[:, 2]

    tokenizer = make_tokenizer()

    def sentences(rng):
        texts = [prompt_of(scene, rng) for scene in scenes(rng)]
        tokens = tokenizer(texts, padding="max_length", max_length=24, return_tensors="np")
        ids = tokens["input_ids"].astype(np.int32) + 1  # The example takes 0 for padding.
        return (ids,), ids

    def of_vae(output, gray, _):
        logits, mean, logvar = output
        rebuilt = optax.sigmoid_binary_cross_entropy(logits, gray).sum(-1)
        divergence = -0.5 * (1 + logvar - mean**2 - jnp.exp(logvar)).sum(-1)
        return (rebuilt + divergence).mean()

    def cross_entropy(logits, labels, _):
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    vae, imagenet, lm1b = (load(flax, name) for name in ("vae", "imagenet", "lm1b"))
    words = len(tokenizer) + 1
    config = lm1b.TransformerConfig(
        vocab_size=words,
        output_vocab_size=words,
        emb_dim=128,
        num_heads=4,
        num_layers=4,
        qkv_dim=128,
        mlp_dim=512,
        max_len=24,
        deterministic=True,
    )
    evaluate, train = {"train": False}, {"train": True}
    resnet = imagenet.ResNet18(num_classes=6, num_filters=16)
    language = lm1b.TransformerLM(config)
    return [
        Example("MLP", "vae", vae.VAE(20), digits, of_vae, {}, {}, 300),
        Example("ResNet-18", "imagenet", resnet, pictures, cross_entropy, evaluate, train, 300),
        Example("transformer", "lm1b", language, sentences, cross_entropy, {}, {}, 200),
    ]


def load(flax: Path, name: str) -> Any:
    """The models of an example."""
    file = flax / "examples" / name / "models.py"
    if not file.is_file():
        sys.exit(f"{file} does not exist; see the first lines of this script")
    spec = importlib.util.spec_from_file_location(f"flax_{name}", file)
    assert spec is not None
    assert spec.loader is not None
    models = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(models)
    return models


def trained(example: Example, rng: np.random.Generator) -> Any:
    arguments, _ = example.batch(rng)
    variables = example.module.init(jax.random.key(0), *arguments, **example.options)
    optimizer = optax.adam(1e-3)

    @jax.jit
    def step(variables, state, arguments, expected):
        def loss(params):
            def call(*arguments):
                given = {**variables, "params": params}
                options = {**example.training, "mutable": ["batch_stats"]}
                return example.module.apply(given, *arguments, **options)

            # The examples' BatchNorm names the axis of devices; here is one.
            one = jax.tree.map(lambda leaf: leaf[None], arguments)
            output, updated = jax.vmap(call, axis_name="batch")(*one)
            output, updated = jax.tree.map(lambda leaf: leaf[0], (output, dict(updated)))
            return example.loss(output, expected, arguments[0]), updated

        (value, updated), gradients = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        updates, state = optimizer.update(gradients, state)
        params = optax.apply_updates(variables["params"], updates)
        return {**variables, **updated, "params": params}, state, value

    state = optimizer.init(variables["params"])
    for number in range(example.steps):
        arguments, expected = example.batch(rng)
        variables, state, value = step(variables, state, arguments, expected)
        if number % 50 == 0:
            print(f"{example.name}: step {number}, loss {float(value):.3f}", file=sys.stderr)
    return variables


def measure(example: Example, policy: str) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    variables = trained(example, rng)
    batches = [example.batch(rng)[0] for _ in range(BATCHES)]
    unseen, _ = example.batch(rng)
    int8, quantized, report = quantize_module(
        example.module, variables, batches, policy, options=example.options
    )

    def outputs(module, variables):
        found = jax.jit(lambda v: module.apply(v, *unseen, **example.options))(variables)
        return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(found)])

    exact, found = outputs(example.module, variables), outputs(int8, quantized)
    lowered = jax.jit(lambda v: int8.apply(v, *unseen, **example.options)).trace(quantized)
    return {
        "model": example.name,
        "example": f"flax/examples/{example.place}",
        "policy": policy,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(variables["params"])),
        "int8_layers": len(report.layers),
        "float_layers": len(report.kept_float),
        **products(lowered.lower(lowering_platforms=("cuda",)).as_text()),
        "sqnr": round(sqnr(np.square(exact).sum(), np.square(found - exact).sum()), 1),
        "worst_layer_sqnr": round(min(layer.sqnr for layer in report.layers), 1),
        "steps_trained": example.steps,
    }


def products(lowered: str) -> dict[str, int]:
    """How many products have two s8 operands, and how many have not; borders' are left out.

    What a shift of channels adds at borders is a product of places by taps, two axes each.
    """
    operands = re.findall(r"stablehlo\.(?:dot_general|convolution).* : \((.*)\) ->", lowered)
    kinds = [
        tuple(re.findall(r"x(i8|i32|f32)>", pair))
        for pair in operands
        if not re.match(r"tensor<\d+x[37]xf32>", pair)
    ]
    of_codes = kinds.count(("i8", "i8"))
    return {"s8_products": of_codes, "other_products": len(kinds) - of_codes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flax", type=Path, required=True, help="flax's source distribution")
    parser.add_argument("--policy", default="qvd-w8a8", help="(%(default)s)")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    results = [measure(example, args.policy) for example in examples(args.flax)]
    command = f"python tests/measure_quantize_module.py --flax {args.flax.name} --out {args.out}"
    write_record(args.out, command, results)


if __name__ == "__main__":
    main()
