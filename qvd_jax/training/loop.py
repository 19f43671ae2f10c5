"""One training loop for every task: optimizer, moving average, checkpoints, progress."""

import functools
import math
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tqdm
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qvd_jax import accelerators, checkpoint
from qvd_jax.axes import Array, Params
from qvd_jax.config import check_seed, to_dict
from qvd_jax.data import video_io
from qvd_jax.errors import InputError, first_line
from qvd_jax.memory import tree_bytes
from qvd_jax.meshes import DATA, FRAME, GUIDANCE, MeshConfig, Work

Batch = Mapping[str, np.ndarray]

_CHECKPOINTS_KEPT = 2


@dataclass(frozen=True)
class LoopConfig:
    """How long and with what a task is trained.

    Attributes:
      steps: optimizer steps.
      batch_size: examples of a step, over all devices.
      learning_rate: the peak, reached after the warm-up.
      warmup_steps: over which it rises linearly.
      decay_steps: after which a cosine has brought it to zero, counted from the first step; None
        is `steps`.
      weight_decay: of AdamW.
      gradient_clip: largest global norm of the gradient.
      ema_decay: of the moving average of the parameters that is the result.
      seed: of initialization, data and noise.
      checkpoint_every: steps between checkpoints.
      sheet_every: steps between sample sheets.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int = 200
    decay_steps: int | None = None
    weight_decay: float = 0.01
    gradient_clip: float = 1.0
    ema_decay: float = 0.999
    seed: int = 0
    checkpoint_every: int = 250
    sheet_every: int = 1000

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "checkpoint_every", "sheet_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: at least 1 is needed")
        check_seed(self.seed)
        if not 0 <= self.warmup_steps < self.steps:
            raise ValueError(
                f"warmup_steps = {self.warmup_steps}: fewer than the {self.steps} steps are needed"
            )
        for name in ("learning_rate", "gradient_clip"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} = {getattr(self, name)}: it must be positive")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay = {self.ema_decay}: it must lie in [0, 1)")
        if self.decay_steps is not None and self.decay_steps < self.steps:
            raise ValueError(
                f"decay_steps = {self.decay_steps}: at least the {self.steps} steps are needed"
            )


class Task(Protocol):
    """What is trained: everything the loop does not know."""

    @property
    def config(self) -> Any:
        """A dataclass that says all about the task."""

    def init(self, key: Array) -> Params:
        """Fresh parameters."""

    def batch(self, rng: np.random.Generator, size: int) -> Batch:
        """Examples, drawn by `rng` alone; the first axis of every array is the batch."""

    def loss(self, params: Params, batch: Mapping[str, Array], key: Array) -> Array:
        """The scalar to minimize; pure."""

    def sheet(self, params: Params) -> np.ndarray:
        """Videos `[B, F, H, W, 3]` that show what the parameters can do."""

    def export(self, params: Params, folder: Path) -> None:
        """Writes the result as a checkpoint."""


class TrainState(NamedTuple):
    """Everything a step changes.

    Attributes:
      params: the parameters.
      average: their exponential moving average.
      opt_state: of the optimizer.
    """

    params: Params
    average: Params
    opt_state: Any


def train(task: Task, config: LoopConfig, out: Path, mesh: MeshConfig | None = None) -> Params:
    """Trains a task, from its newest good checkpoint if there is one.

    The examples and the noise of a step depend on the seed and the number of the step alone, so
    that a run which was interrupted ends like one which was not.

    Args:
      task: what is trained.
      config: how.
      out: a folder for checkpoints and sample sheets; made if it does not exist.
      mesh: of `data_mesh`.

    Returns:
      The moving average of the parameters.

    Raises:
      InputError: the folder holds another run, the batch does not fit the devices, or the loss
        is not finite.
    """
    divided = data_mesh(config, mesh)
    replicated = NamedSharding(divided, PartitionSpec())
    over_batch = NamedSharding(divided, PartitionSpec(DATA))
    optimizer = _optimizer(config)

    def fresh(key: Array) -> TrainState:
        params = task.init(key)
        return TrainState(params, jax.tree.map(jnp.copy, params), optimizer.init(params))

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=replicated)
    def step_once(
        state: TrainState, batch: Mapping[str, Array], step: Array
    ) -> tuple[TrainState, Array]:
        key = jax.random.fold_in(jax.random.key(config.seed), step)
        loss, gradients = jax.value_and_grad(task.loss)(state.params, batch, key)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        # Early on the average would remember the initialization for too long.
        decay = jnp.minimum(config.ema_decay, (1 + step) / (10 + step))
        average = optax.incremental_update(params, state.average, 1 - decay)
        # A gradient that is not finite ruins the parameters while the loss still is.
        return TrainState(params, average, opt_state), loss + 0 * optax.tree.norm(gradients)

    state = jax.jit(fresh, out_shardings=replicated)(jax.random.key(config.seed))
    described = {"loop": to_dict(config), "task": to_dict(task.config)}
    with Checkpoints(out, described) as checkpoints:
        state, done = checkpoints.restore(state)
        with tqdm.tqdm(total=config.steps, initial=done, desc="compiling", unit="step") as bar:
            for step in range(done, config.steps):
                rng = np.random.default_rng([config.seed, step])
                batch = jax.device_put(dict(task.batch(rng, config.batch_size)), over_batch)
                inputs = state, batch, jnp.int32(step)
                if step == done:
                    compiled = step_once.lower(*inputs).compile()
                    bar.set_description_str("training", refresh=False)
                    # The bar's clock begins with the steps.
                    bar.unpause()
                state, loss = compiled(*inputs)
                if not math.isfinite(value := float(loss)):
                    raise InputError(
                        f"step {step + 1}: the loss is {value}; {checkpoints.latest()}. A lower "
                        f"learning_rate than {config.learning_rate:g} may help"
                    )
                bar.update()
                bar.set_postfix(loss=f"{value:.4f}", refresh=False)
                if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
                    checkpoints.save(step + 1, state)
                if (step + 1) % config.sheet_every == 0:
                    sheet = out / f"sheet-{step + 1:06d}.png"
                    average = jax.device_put(state.average, jax.local_devices()[0])
                    video_io.write_contact_sheet(sheet, task.sheet(average))
    return jax.device_put(state.average, jax.local_devices()[0])


def data_mesh(config: LoopConfig, asked: MeshConfig | None = None) -> Mesh:
    """All devices, over which a batch divides.

    Raises:
      InputError: it does not, what is asked for divides something else, or there are several hosts.
    """
    accelerators.check_used()
    if jax.process_count() > 1:
        raise InputError(
            f"training works on one host; the devices are those of {jax.process_count()}"
        )
    devices = jax.devices()
    whole = dict.fromkeys((GUIDANCE, FRAME), "training divides its batch alone")
    mesh = Work(config.batch_size, whole=whole).resolve(asked, len(devices)).over(devices)
    if config.batch_size % mesh.size:
        raise InputError(
            f"batch_size = {config.batch_size} does not divide over {mesh.size} devices"
        )
    return mesh


def _optimizer(config: LoopConfig) -> optax.GradientTransformation:
    warmup = max(config.warmup_steps, 1)
    # Behind the warm-up there is a step at least, of one step in all as well.
    decay = max(config.decay_steps or config.steps, warmup + 1)
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, decay)
    return optax.chain(
        optax.clip_by_global_norm(config.gradient_clip),
        optax.adamw(schedule, b2=0.99, weight_decay=config.weight_decay),
    )


class Checkpoints:
    """The last checkpoints of a run; a damaged one is named and the one before it taken.

    A damaged one is kept under another name, for what damaged it may pass.
    """

    def __init__(self, out: Path, described: dict[str, Any]) -> None:
        self._folder = out.absolute() / "checkpoints"
        self._described = described
        for unfinished in self._folder.glob("*.orbax-checkpoint-tmp*"):
            tqdm.tqdm.write(f"{unfinished} is of a save that was interrupted, and deleted")
            shutil.rmtree(unfinished)
        try:
            self._manager = ocp.CheckpointManager(
                self._folder,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=_CHECKPOINTS_KEPT, create=True, enable_async_checkpointing=False
                ),
                item_names=("state", "run"),
            )
        except (OSError, ValueError) as error:
            raise InputError(f"{out} cannot hold checkpoints: {first_line(error)}") from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def latest(self) -> str:
        """A phrase on the newest checkpoint, for messages."""
        step = self._manager.latest_step()
        return "there is no checkpoint yet" if step is None else f"{self._folder / str(step)} holds"

    def save(self, step: int, state: TrainState) -> None:
        """Writes the state after `step` steps.

        Raises:
          InputError: it cannot be written; the checkpoints before it stay.
        """
        checkpoint.check_space(self._folder, tree_bytes(state))
        run = {**self._described, "checksum": _checksum(state)}
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), run=ocp.args.JsonSave(run)
                ),
            )
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self._folder / str(step)} could not be written: {first_line(error)}"
            ) from error

    def restore(self, fresh: TrainState) -> tuple[TrainState, int]:
        """The newest checkpoint that is whole, with its number of steps; or `fresh` and 0.

        Raises:
          InputError: the checkpoints are of a run with other settings.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            place = self._folder / str(step)
            try:
                state = self._read(step, fresh)
            except InputError:
                raise
            except Exception as error:  # Orbax raises what its many parts raise.
                # Orbax would save no step before one that bears a number.
                aside = place.with_name(f"damaged-{step}")
                shutil.rmtree(aside, ignore_errors=True)
                place.rename(aside)
                self._manager.reload()
                tqdm.tqdm.write(f"{place} is damaged, now {aside.name}: {first_line(error)}")
                continue
            tqdm.tqdm.write(f"resuming from {place}")
            return state, step
        return fresh, 0

    def _read(self, step: int, fresh: TrainState) -> TrainState:
        items = ocp.args.Composite(run=ocp.args.JsonRestore())
        described = dict(self._manager.restore(step, args=items)["run"])
        checksum = described.pop("checksum")
        _check_same_run(described, self._described, self._folder / str(step))
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, fresh)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        state = self._manager.restore(step, args=items)["state"]
        if _checksum(state) != checksum:
            raise ValueError("its arrays do not match their checksum")
        return state


def _check_same_run(found: dict[str, Any], expected: dict[str, Any], where: Path) -> None:
    """Raises `InputError` naming the settings in which two runs differ."""
    have, want = (flax.traverse_util.flatten_dict(tree, sep=".") for tree in (found, expected))
    different = sorted(key for key in have | want if have.get(key) != want.get(key))
    if different:
        listed = ", ".join(
            f"{key} {have.get(key)!r} there, {want.get(key)!r} here" for key in different
        )
        raise InputError(f"{where} is of another run ({listed}); choose another --out")


def _checksum(state: TrainState) -> int:
    """CRC-32 of all arrays; Orbax's own format would not notice a flipped bit."""
    value = 0
    for leaf in jax.tree.leaves(state):
        value = zlib.crc32(np.asarray(leaf).tobytes(), value)
    return value
