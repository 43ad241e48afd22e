"""A backend whose four operations are plain autograd of standard attention: the truth about a native backend's operations, and
what `tilewise/derivatives.py` is tested with where there are no kernels."""
import torch

from tilewise import reference
from tilewise.backends import Gradients, Tangents

supports = volunteers = supports_tangents = reference.supports


def forward(problem, x):
    with torch.no_grad():
        return reference.attention(problem, x)


def backward(problem, x, out, lse, dout, dlse, needs):
    leaves, outputs = graph(problem, x)
    captured = [t.detach().requires_grad_() if t.is_floating_point() else t for t in x.captured]
    if any(needs.captured):
        leaves, outputs = graph(problem, x._replace(captured=captured))
    wanted = [t for t, needed in zip(captured, needs.captured, strict=False) if needed]
    found = torch.autograd.grad(outputs, [*filled(leaves), *wanted], cotangents(outputs, dout, dlse), allow_unused=True)
    gradients, rest = arranged(leaves, found, needs), iter(found[len(filled(leaves)):])
    return gradients._replace(captured=[next(rest) if needed else None for needed in needs.captured])


def tangent(problem, x, u, out, lse):
    leaves, outputs = graph(problem, x)
    with torch.enable_grad():
        g = [torch.zeros_like(y).requires_grad_() for y in outputs]
        pulled = torch.autograd.grad(outputs, filled(leaves), g, create_graph=True, allow_unused=True)
        product = inner(leaves, pulled, u)
    found = torch.autograd.grad(product, g, allow_unused=True) if product is not None else (None, None)
    return tuple(torch.zeros_like(y) if t is None else t for y, t in zip(outputs, found, strict=True))


def backward_tangent(problem, x, u, out, lse, out_tangent, lse_tangent, dout, dlse, needs):
    leaves, outputs = graph(problem, x)
    with torch.enable_grad():
        pulled = torch.autograd.grad(outputs, filled(leaves), cotangents(outputs, dout, dlse), create_graph=True,
                                     allow_unused=True)
        product = inner(leaves, pulled, u)
    found = ([None] * len(filled(leaves)) if product is None or not product.requires_grad
             else torch.autograd.grad(product, filled(leaves), allow_unused=True))
    return arranged(leaves, found, needs)


def graph(problem, x):
    """Fresh leaves q, k, v, bias, sinks, and (out, lse) of them, lse finite."""
    leaves = Tangents(*(None if t is None else t.detach().requires_grad_() for t in x[:5]))
    with torch.enable_grad():
        out, lse = reference.attention(problem, x._replace(**leaves._asdict()))
        return leaves, (out, torch.where(lse == -torch.inf, 0.0, lse))


def filled(tensors):
    return [t for t in tensors if t is not None]


def cotangents(outputs, dout, dlse):
    return [dout, torch.zeros_like(outputs[1]) if dlse is None else dlse]


def inner(leaves, pulled, u):
    """<pulled, u>, or None where nothing moves."""
    named = iter(pulled)
    of_leaves = [None if leaf is None else next(named) for leaf in leaves]
    terms = [(g * t).sum() for g, t in zip(of_leaves, u, strict=True) if g is not None and t is not None]
    return sum(terms) if terms else None


def arranged(leaves, found, needs):
    named = iter(found)
    of_leaves = [None if leaf is None else next(named) for leaf in leaves]
    own = [None if leaf is None else torch.zeros_like(leaf) if g is None else g.clone()  # no views, as kernels give none
           for leaf, g in zip(leaves, of_leaves, strict=True)]
    return Gradients(*own[:3], own[3] if needs.bias else None, own[4] if needs.sinks else None)
