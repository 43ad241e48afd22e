"""flash_attn.cute.interface."""
from tilewise.compat.flash_attn_cute import (
    flash_attn_combine,
    flash_attn_func,
    flash_attn_varlen_func,
    get_scheduler_metadata,
)

__all__ = ["flash_attn_combine", "flash_attn_func", "flash_attn_varlen_func", "get_scheduler_metadata"]
