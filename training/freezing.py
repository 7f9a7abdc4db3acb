"""A backbone that waits: for the first epochs of a fine-tuning only the classifier learns."""

from torch.nn.modules.batchnorm import _BatchNorm

from model_resnet50 import head_of
from training.step import Training, parallel


def set_frozen(training: Training, frozen: bool) -> None:
    """Freeze all but the classifier, or let everything learn again. The model must be in training mode.

    Frozen parameters get no gradients, so that no optimiser changes them, and frozen BatchNorm normalises with the
    statistics that it has.
    """
    head = {id(parameter) for parameter in training.model.get_submodule(head_of(training.model)).parameters()}
    changed = False
    for parameter in training.model.parameters():
        learns = not frozen or id(parameter) in head
        changed |= parameter.requires_grad != learns
        parameter.requires_grad_(learns)
    for module in training.model.modules():
        if isinstance(module, _BatchNorm):
            module.train(not frozen)
    if changed:  # DDP waits for the gradients that it found when it was made
        training.optimizer.zero_grad(set_to_none=True)
        training.ddp = parallel(training.model, training.device)
