"""flash_attn.cute, FlashAttention-4: `tilewise.compat.flash_attn_cute`."""
from tilewise.compat.flash_attn_cute import flash_attn_func, flash_attn_varlen_func

__all__ = ["flash_attn_func", "flash_attn_varlen_func"]
