"""A small network in three parts: `embed` and `out` run in the hospitals, `body` in the registry."""

from torch import Tensor, nn

CUT, TAIL = "body", "out"


class Net(nn.Module):
    """Tells benign tumours from malignant ones by 30 measurements."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(30, 16), nn.Tanh())
        self.body = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.SiLU())
        self.out = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, (n, 2)."""
        out: Tensor = self.out(self.body(self.embed(x)))
        return out
