"""GroupNorm over the original AnimateDiff code's scopes, in diffusers' networks."""

import torch


class OracleNorm(torch.nn.Module):
    """GroupNorm over chosen axes, written out; swaps the scope of a diffusers norm."""

    def __init__(self, norm: torch.nn.GroupNorm, frames: int, joint: bool):
        super().__init__()
        self.norm, self.frames, self.joint = norm, frames, joint

    def forward(self, x):
        # Motion norms see [B, C, F, H, W], resnet norms [B * F, C, H, W].
        shape = x.shape
        x = x.permute(0, 2, 1, 3, 4) if x.ndim == 5 else x.unflatten(0, (-1, self.frames))
        groups = x.unflatten(2, (self.norm.num_groups, -1))
        axes = (1, 3, 4, 5) if self.joint else (3, 4, 5)
        mean = groups.mean(axes, keepdim=True)
        variance = ((groups - mean) ** 2).mean(axes, keepdim=True)
        x = ((groups - mean) / (variance + self.norm.eps).sqrt()).flatten(2, 3)
        x = x * self.norm.weight[:, None, None] + self.norm.bias[:, None, None]
        return x.permute(0, 2, 1, 3, 4) if len(shape) == 5 else x.flatten(0, 1)


def original_norms(unet: torch.nn.Module, version: str, frames: int) -> None:
    """Those of the original code: motion norms per frame, v1's resnet norms jointly over frames."""
    for name, module in list(unet.named_modules()):
        for child_name, child in module.named_children():
            path = f"{name}.{child_name}"
            if not isinstance(child, torch.nn.GroupNorm):
                continue
            if "motion_modules" in path:
                setattr(module, child_name, OracleNorm(child, frames, joint=False))
            elif version == "v1" and ".attentions." not in path:
                setattr(module, child_name, OracleNorm(child, frames, joint=True))
