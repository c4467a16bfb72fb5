"""What a run shows while it trains: progress bar, TensorBoard curves, pictures, and the diagnosis of failure modes.

Nothing here changes the state of the run. An error is logged as one warning, and training continues.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from tqdm import tqdm

from training.failure_modes import diagnose
from training.optimizers import parameter_groups
from training.tensorboard import Board, pictures_of

log = logging.getLogger("train")
BAR_EVERY = 10  # steps between updates of the loss on the progress bar


@contextmanager
def errors_logged(what: str) -> Iterator[None]:
    """Log an exception as one warning that begins with `what`, with the traceback at level debug, and go on."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())
        log.warning("%s failed, training goes on (%s: %s)", what, type(error).__name__, reason)
        log.debug("%s", what, exc_info=True)


class Monitor:
    """Shows the steps of a trainer. In processes other than the first, every method does nothing."""

    def __init__(self, trainer):
        options = trainer.options
        self.trainer = trainer
        self.shown = trainer.processes.first
        self.board = Board(trainer.dir, options.tensorboard, trainer.step) if self.shown else None
        self.bar = tqdm(total=options.num_iters, initial=trainer.step, desc=trainer.dir.name, unit="step",
                        dynamic_ncols=True, disable=not self.shown)

    def show(self, terms: dict[str, Tensor], error: Tensor) -> None:
        """Show a step, given what `Trainer.train_step` returned: on the progress bar, as a point of TensorBoard's
        curves every `i_print` steps, and as pictures every `i_img` steps."""
        self.bar.update()
        if not self.shown:
            return
        options = self.trainer.options
        step = self.trainer.step
        with errors_logged(f"step {step}: logging"):
            if step % BAR_EVERY == 0:
                self.bar.set_postfix(loss=f"{terms['total']:.3f}", flow_px=f"{error:.2f}", refresh=False)
            if step % options.i_print == 0:
                self.board.scalars(self._scalars(terms, error), step)
            if options.i_img and step % options.i_img == 0:
                self.board.pictures(pictures_of(self.trainer), step)
                self.board.weights(self.trainer.model, step)

    def _scalars(self, terms: dict[str, Tensor], error: Tensor) -> dict[str, float]:
        """One value for each of TensorBoard's curves."""
        trainer = self.trainer
        options = trainer.options
        losses = {f"loss/{name}": float(value) for name, value in terms.items()}
        rates = {f"lr/{name}": group["lr"] for name, group in parameter_groups(trainer.optimizers).items()}
        steps_per_second = self.bar.format_dict["rate"] or 0.0
        samples_per_step = options.num_pairs * options.num_pts * trainer.model.config.num_samples_ray
        return {**losses, **rates, "flow_error_px": float(error), "gradient_norm": float(trainer.gradient_norm),
                "steps_per_second": steps_per_second, "samples_per_second": steps_per_second * samples_per_step}

    def diagnose(self) -> None:
        """Compare the model with the correspondences (training/failure_modes.py)."""
        if self.shown:
            with errors_logged(f"step {self.trainer.step}: the diagnosis of failure modes"):
                diagnose(self.trainer)

    def close(self) -> None:
        """Close the progress bar and the TensorBoard files."""
        self.bar.close()
        if self.board is not None:
            with errors_logged("closing the TensorBoard files"):
                self.board.close()
