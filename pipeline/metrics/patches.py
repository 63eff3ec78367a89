"""Images for the perturbation planner: which perturbed images of a batch differ, and how each of them is run.

`mask` and `blur` change pixels; `delete` and `attention` take patch tokens away inside the model (METRICS 1).

Shapes: B images, C channels, H x W pixels, T positions, N = rows x columns patches among them, R requests, U distinct
images.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from calig.pipeline.attribution.dropping import dropped_positions, hidden_positions
from calig.pipeline.attribution.model import ExplainableModel, UnsupportedModelError
from calig.pipeline.attribution.pixels import baseline_pixels, patch_grid
from calig.pipeline.errors import InputError, unknown
from calig.pipeline.metrics.image_operators import paste_patches, patch_filling
from calig.pipeline.metrics.names import IMAGE_NAMES, operator_name

if TYPE_CHECKING:
    from calig.pipeline.metrics.operators import PerturbationTokens
    from calig.pipeline.metrics.perturbation import Forward, Request

    Perturber: TypeAlias = "PerturbationTokens | PatchPerturbation"

PATCH_OPERATORS = ("mask", "blur", "attention", "delete")
_INSIDE: dict[str, Callable[[ExplainableModel, Tensor], AbstractContextManager[None]]] = {
    "attention": hidden_positions,
    "delete": dropped_positions,
}


@dataclass(frozen=True)
class PatchPerturbation:
    """What images are perturbed with: the counterpart of `PerturbationTokens`.

    Attributes:
        model: The model that is asked; `attention` and `delete` reach into it.
        processor: Says what the data set's mean colour is after normalisation; without one it is 0.
        pixels: Key of the images in a batch.
    """

    model: ExplainableModel
    processor: Any = None
    pixels: str = "pixel_values"
    _alone: dict[tuple[int, ...], bool] = field(default_factory=dict, init=False, repr=False, compare=False)

    def named(self, operator: str) -> str:
        """The name that rows and keys have for an operator, whichever of its names is given."""
        return operator_name(operator)

    def check(self, operator: str) -> None:
        """Raise InputError if this model's images cannot be perturbed by ``operator``."""
        if operator not in PATCH_OPERATORS:
            names = " and ".join(f"'{other}' is '{name}'" for other, name in IMAGE_NAMES.items())
            raise unknown("operator on images", operator, PATCH_OPERATORS, f"By another name {names}.")
        try:
            if operator == "attention":
                self.model.require_interface()
            elif operator == "delete":
                self._try_dropping()
        except UnsupportedModelError as error:
            raise InputError(f"the operator '{operator}' does not work on this model: {error}") from error

    def _try_dropping(self) -> None:
        """Drop a patch of an empty image, where the model's config says how large its images are."""
        config = self.model.structure.config
        config = getattr(config, "vision_config", config)
        size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
        if size is None:
            return
        shape = (size, size) if isinstance(size, int) else tuple(size)
        with self.model.session(), torch.no_grad():
            kind = next(self.model.module.parameters()).dtype
            batch = {self.pixels: torch.zeros(1, channels, *shape, device=self.model.device, dtype=kind)}
            inputs = self.model.prepare(batch)
            keep = torch.ones_like(inputs.mask)
            keep[0, inputs.content[0].nonzero()[-1]] = False
            with dropped_positions(self.model, keep):
                self.model.logits_of_batch(inputs.batch)

    def distinct(
        self, batch: Mapping[str, Any], requests: Sequence[Request], *, special: Tensor, mask: Tensor
    ) -> PatchRequests:
        """Find the distinct images among the requests of a batch; arguments as for `perturbed_logits`."""
        return PatchRequests(self, batch, requests, special, mask)


class PatchRequests:
    """The U distinct perturbed images of a batch, each made when it is run.

    Two requests are the same if they keep the same patches of one image by one operator; where all patches stay, the
    operator does not matter.

    Attributes:
        lengths: U numbers of positions that run.
        groups: U kinds: what runs in one forward pass is of one kind.
        inverse: (R,) int64 the image of each request.

    Raises:
        InputError: The batch has no images, or they have no grid.
    """

    def __init__(
        self,
        perturbation: PatchPerturbation,
        batch: Mapping[str, Any],
        requests: Sequence[Request],
        special: Tensor,
        mask: Tensor,
    ) -> None:
        if perturbation.pixels not in batch:
            raise InputError(f"the batch lacks '{perturbation.pixels}'. It has: {', '.join(batch) or 'nothing'}.")
        self.perturbation, self.batch = perturbation, batch
        self.pixels: Tensor = batch[perturbation.pixels]
        self.special, self.content = special.cpu().bool(), (mask & ~special).cpu().bool()
        config = perturbation.model.structure.config
        height, width = self.pixels.shape[2:]
        self.grid = patch_grid(height, width, int(self.content[0].sum()), patch_size_of(config))
        self._filled: dict[str, Tensor] = {}
        seen: dict[tuple[int, str, bytes], int] = {}
        self.images: list[tuple[int, str, Tensor]] = []
        self.lengths: list[int] = []
        self.groups: list[Hashable] = []
        inverse = []
        for request in requests:
            kept = request.keep.cpu() & self.content[request.example]
            whole = torch.equal(kept, self.content[request.example])
            operator = "mask" if whole else request.operator
            key = (request.example, operator, kept.numpy().tobytes())
            place = seen.setdefault(key, len(self.images))
            inverse.append(place)
            if place == len(self.images):
                self._add(request.example, operator, kept)
        self.inverse = torch.tensor(inverse)

    def _add(self, example: int, operator: str, kept: Tensor) -> None:
        if operator in _INSIDE and not bool(kept.any()) and not self._runs_on_special_positions():
            operator = "mask"  # nothing is left that could be run
        self.images.append((example, operator, kept))
        length = int((kept | self.special[example]).sum())
        inside = operator in _INSIDE
        self.lengths.append(length if operator == "delete" else len(kept))
        self.groups.append((operator, length) if inside else None)

    def _runs_on_special_positions(self) -> bool:
        """Whether the model has an output for an image without patches: one that averages them has not."""
        model, alone = self.perturbation.model, self.perturbation._alone
        shape = tuple(self.pixels.shape[1:])
        if shape not in alone:
            first = torch.tensor([0])
            try:
                with dropped_positions(model, self.special[:1]), torch.no_grad():
                    alone[shape] = bool(model.logits_of_batch(self._rows(first)).isfinite().all())
            except (RuntimeError, UnsupportedModelError):
                alone[shape] = False
        return alone[shape]

    def run(self, forward: Forward, chosen: Sequence[int]) -> Tensor:
        """The (n, C) logits of some of the images, all of one group."""
        rows = torch.tensor([self.images[i][0] for i in chosen])
        keep = torch.stack([self.images[i][2] for i in chosen])
        operators = {self.images[i][1] for i in chosen}
        batch = self._rows(rows)
        if operators <= set(_INSIDE):
            (operator,) = operators
            with _INSIDE[operator](self.perturbation.model, (keep | self.special[rows]).to(self.pixels.device)):
                return forward(batch)
        pixels = batch[self.perturbation.pixels]
        for operator in sorted(operators):
            mine = torch.tensor([self.images[i][1] == operator for i in chosen], device=pixels.device)
            filled = self._fillings(operator)[rows.to(pixels.device)]
            stays = keep[self.content[rows]].view(len(chosen), -1).to(pixels.device) | ~mine.unsqueeze(1)
            pixels = paste_patches(pixels, filled, stays, self.grid)
        return forward({**batch, self.perturbation.pixels: pixels})

    def _rows(self, rows: Tensor) -> dict[str, Any]:
        size = len(self.pixels)
        return {
            key: value[rows.to(value.device)]
            if isinstance(value, Tensor) and value.ndim and len(value) == size
            else value
            for key, value in self.batch.items()
        }

    def _fillings(self, operator: str) -> Tensor:
        if operator not in self._filled:
            mean = baseline_pixels(self.pixels[:1], "mean", self.perturbation.processor)[0]
            self._filled[operator] = patch_filling(self.pixels, operator, grid=self.grid, mean=mean)
        return self._filled[operator]


def patch_size_of(config: Any) -> Any:
    """The patch size that a model's config names, None where it names none."""
    return getattr(getattr(config, "vision_config", config), "patch_size", None)
