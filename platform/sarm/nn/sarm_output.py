"""What a SARM's forward pass gives. N rewarded tokens, B rows, K active latents."""

from dataclasses import dataclass

from torch import Tensor
from transformers.utils.generic import ModelOutput


@dataclass
class SarmOutput(ModelOutput):
    """`logits` [N, 1] raw rewards; with TopK or thresholds, `latent_values` and `latent_indices` [N, K] whose weighted sum they are.

    `loss` (squared error against labels) and `reconstruction_loss` [N] are there where they were asked for. Where `forward` looked for the
    rewarded token itself, `cut_off` [B] says which answers had no end of turn, and `unopened` [B] in which rows the template
    opens no answer at all: plain strings, prompts, texts in another template. `unscored` [B] says where text follows the rewarded token: what
    follows an end of turn within the answer, or a later turn of the user's.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    latent_values: Tensor | None = None
    latent_indices: Tensor | None = None
    reconstruction_loss: Tensor | None = None
    cut_off: Tensor | None = None
    unopened: Tensor | None = None
    unscored: Tensor | None = None
