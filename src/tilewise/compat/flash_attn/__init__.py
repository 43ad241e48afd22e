"""flash-attn 2's package (2.8): `from tilewise.compat.flash_attn import flash_attn_func`, or `tilewise.compat.install()`.

Same names, arguments, order, defaults, shapes and results; what differs is more: any dtype, head dims to 512, pages of any
size, dropout with softcap, CPU tensors, lse differentiable, and as keywords the words of the later generations.
"""
from tilewise import __version__ as _of_tilewise
from tilewise.compat.flash_attn.flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

__version__ = f"2.8.3+tilewise.{_of_tilewise}"    # compares as the version whose interface this is, and says what it is

__all__ = ["flash_attn_func", "flash_attn_kvpacked_func", "flash_attn_qkvpacked_func", "flash_attn_varlen_func",
           "flash_attn_varlen_kvpacked_func", "flash_attn_varlen_qkvpacked_func", "flash_attn_with_kvcache"]
