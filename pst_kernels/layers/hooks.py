"""Hooks that a user put on a layer before another took its place."""

from __future__ import annotations

import weakref

from torch import nn

KINDS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
    "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip


def carry_over(old: nn.Module, new: nn.Module) -> None:
    """Let `new` call the hooks of `old`. They share the dicts, so that the handles go on removing what they added."""
    for kind in KINDS:
        new.__dict__[kind] = old.__dict__[kind]
    new._is_full_backward_hook = old._is_full_backward_hook
    for hook in new._load_state_dict_pre_hooks.values():
        if getattr(hook, "with_module", False):
            hook.module = weakref.ref(new)  # type: ignore[attr-defined]
