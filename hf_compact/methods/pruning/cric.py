"""CRIC: groups that seem redundant are brought to zero and back, and what that costs decides.

Scores at the weights as they are say little about a group at zero: where the loss is flat around small weights, a group
that nothing can replace scores low. So each cycle shrinks the groups with the lowest scores to zero while everything is
trained, and then puts the weights back. The gradients on the way add up to the growth of the loss, group by group.

Source: HESSO-CRIC, arXiv 2409.09085. Differs: the loss is shared out by the integral of the gradient along the way (as
Aumann and Shapley share costs) and not by probes of whole layers, and a group is tried when it is among the lowest at the
end of a cycle.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...errors import FormatError
from ...groups import GroupSet
from ...reorder import Slice

#: In the folder of a checkpoint that was written during a cycle.
FILE_NAME = "cric.safetensors"
_VECTORS = ("scores", "gains", "cycle_gains", "is_tried", "is_trial")


class Correction:
    """What the cycles have found out. Vectors run over the groups of all sets, one set after the other.

    Args:
        model: its trained parameters, and what groups lie in, are what each cycle ends with.
        sets: the groups.
    """

    def __init__(self, model: PreTrainedModel, sets: list[GroupSet]) -> None:
        """Copy the weights to the CPU."""
        self.sizes = [group_set.num_groups for group_set in sets]
        shrunk = {id(part.parameter) for group_set in sets for part in group_set.slices}
        self.reference = {
            name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad or id(p) in shrunk
        }
        number = sum(self.sizes)
        self.num_samples = 0
        self.scores = torch.zeros(number, dtype=torch.float64)
        self.gains = torch.zeros(number, dtype=torch.float64)
        self.cycle_gains = torch.zeros(number, dtype=torch.float64)
        self.is_tried = torch.zeros(number, dtype=torch.bool)
        self.is_trial = torch.zeros(number, dtype=torch.bool)

    def add_gradients(self, model: PreTrainedModel, sets: list[GroupSet]) -> None:
        """One more point of every group's way: `-g w`, `w` the weights before the cycle, is how fast the loss grows."""
        names: dict[nn.Parameter, str] = {parameter: name for name, parameter in model.named_parameters()}

        def slope(part: Slice) -> Tensor:
            parameter = part.parameter
            if parameter.grad is None:
                return torch.zeros_like(parameter)
            return -parameter.grad.float() * self.reference[names[parameter]].to(parameter.device)

        self.cycle_gains += torch.cat([group_set.totals(slope) for group_set in sets])

    def add_scores(self, scores: list[Tensor]) -> None:
        """One more sample of every group's score, set by set."""
        self.scores += torch.cat(scores)
        self.num_samples += 1

    def totals(self, kinds: list[str], weight: float) -> list[Tensor]:
        """Mean scores and, over its norm within the kind, the growth of the loss; set by set."""
        gains = self.gains.clamp_min(0).split(self.sizes)
        norms = {kind: torch.cat([g for g, other in zip(gains, kinds, strict=True) if other == kind]).norm() for kind in kinds}
        means = (self.scores / max(self.num_samples, 1)).split(self.sizes)
        return [
            mean + weight * gain / (norms[kind] + 1e-8) for mean, gain, kind in zip(means, gains, kinds, strict=True)
        ]  # fmt: skip

    def trials(self) -> list[Tensor]:
        """Numbers of the groups that are on their way, set by set."""
        return [mask.nonzero()[:, 0] for mask in self.is_trial.split(self.sizes)]

    @torch.no_grad()
    def end_cycle(self, model: PreTrainedModel, num_steps: int) -> None:
        """Put the weights back; of groups that were on their way the integral counts, of untried ones the latest slope."""
        is_new = self.is_trial | ~self.is_tried
        self.gains = torch.where(is_new, self.cycle_gains / num_steps, self.gains)
        self.cycle_gains.zero_()
        self.is_tried |= self.is_trial
        self.put_back_(model)

    @torch.no_grad()
    def put_back_(self, model: PreTrainedModel) -> None:
        """The weights are what they were before the cycle."""
        for name, parameter in model.named_parameters():
            if name in self.reference:
                parameter.copy_(self.reference[name])

    def tensors(self) -> dict[str, Tensor]:
        """Everything, for a file."""
        return {
            **{f"reference.{name}": tensor for name, tensor in self.reference.items()},
            **{name: getattr(self, name) for name in _VECTORS},
            "num_samples": torch.tensor(self.num_samples),
        }

    def load_(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `tensors` gave.

        Raises:
            FormatError: it was given for other groups or another model.
        """
        mine = {name: tensor.shape for name, tensor in self.tensors().items()}
        if mine != {name: tensor.shape for name, tensor in tensors.items()}:
            raise FormatError(f"{FILE_NAME} was written for other groups: resume with the settings it was made with")
        self.reference = {name: tensors[f"reference.{name}"] for name in self.reference}
        for name in _VECTORS:
            setattr(self, name, tensors[name])
        self.num_samples = int(tensors["num_samples"])
