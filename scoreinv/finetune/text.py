"""Sentences of a fixed length: the model of an absorbing chain, and controls of it.

The model learns to guess all masked characters at once. With m of L places masked, m uniform over 1 to L,

    loss  =  E_m  L / m  sum_{i masked} -log p(x_i | the others)  >=  -log p(x),

as every order of revealing counts the same: Hoogeboom et al., Autoregressive Diffusion Models (2022, arXiv:2110.02037).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scoreinv.finetune.absorbing import AbsorbingChain
from scoreinv.finetune.control import Guide, VectorControl
from scoreinv.priors.unet import initialise
from scoreinv.streams import seeded, stream

RARE = 1e-30  # probability below which a character is not told from one that cannot be


class Denoiser(nn.Module):
    """A perceptron with residual blocks over all places.

    Args:
        shape: (A, L).
        width: Of each block.
        blocks: How many.
        seed: Of the first weights.
    """

    @seeded(0)
    def __init__(
        self, shape: tuple[int, int], width: int = 256, blocks: int = 2, seed: int = 0
    ) -> None:
        super().__init__()
        self.shape, d = tuple(shape), shape[0] * shape[1]
        self.enter = nn.Linear(d, width)
        block = lambda: nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.blocks = nn.ModuleList(block() for _ in range(blocks))
        self.leave = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, d))
        initialise(self, stream(seed))

    def log_p(self, x: Tensor) -> Tensor:
        """Log-probabilities of characters at each place, with shape (B, A, L), of sentences with that shape."""
        h = self.enter(x.flatten(1))
        for block in self.blocks:
            h = h + block(h)
        return torch.log_softmax(self.leave(h).reshape(x.shape), 1)

    def forward(self, x: Tensor) -> Tensor:
        """Probabilities of characters at each place."""
        return self.log_p(x).exp()


def train_denoiser(
    texts: Tensor,
    iterations: int,
    seed: int,
    batch: int = 128,
    rate: float = 2e-3,
    width: int = 256,
) -> tuple[Denoiser, list[float]]:
    """A model of sentences, and the bound on -log p that it had in each iteration [nat].

    Args:
        texts: Sentences, with shape (N, A, L).
        iterations: Of the optimiser.
        seed: Decides everything random.
        batch: Sentences at a time.
        rate: Largest learning rate; it falls to 0 over the second half.
        width: See `Denoiser`.
    """
    A, L = texts.shape[1:]
    model, generator, history = Denoiser((A, L), width, seed=seed), stream(seed, 1), []
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98))
    for i in range(iterations):
        x = texts[torch.randint(len(texts), (batch,), generator=generator)]
        m = torch.randint(1, L + 1, (batch, 1), generator=generator)
        hidden = torch.rand(batch, L, generator=generator).argsort(1).argsort(1) < m
        lost = -(model.log_p(x * ~hidden[:, None]) * x).sum(1) * hidden
        loss = (L / m[:, 0] * lost.sum(1)).mean()
        optimiser.param_groups[0]["lr"] = rate * min(1, (i + 1) / 50, 2 * (1 - i / iterations))
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimiser.step()
        history.append(float(loss.detach()))
    return model.requires_grad_(False), history


class TextControl(VectorControl):
    """A perceptron that adds v to the model's logits: u = log softmax(f + v) - log softmax(f).

    Args:
        chain: That is tilted.
        told: Numbers in the data of a sentence, of unit scale such as one-hot characters; 0 if there are none.
        guide: Shifts of the logits that the data alone ask for, with shape (B, A, L), see `LearnedControl`.
        width: Of each hidden layer.
        layers: Hidden ones.
        seed: Of the first weights.
    """

    def __init__(
        self,
        chain: AbsorbingChain,
        told: int = 0,
        guide: Guide | None = None,
        width: int = 256,
        layers: int = 2,
        seed: int = 0,
    ) -> None:
        unit = torch.tensor([[-1.0], [1.0]]).expand(2, told) if told else None
        super().__init__(chain, unit, guide, width, layers, seed)

    def forward(
        self, x: Tensor, denoised: Tensor, g: Tensor | None, k: Tensor, y: Tensor | None
    ) -> Tensor:
        f = denoised.clamp_min(RARE).log()
        v = super().forward(x, denoised, g, k, y)
        return torch.log_softmax(f + v, 1) - torch.log_softmax(f, 1)
