"""A wrong gradient, which a check must see."""
import torch


class Halved(torch.autograd.Function):
    """x, whose gradient is half of what it should be."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad / 2
