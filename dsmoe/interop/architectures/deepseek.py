"""DeepSeek-V2 and V3, which are refused for their attention."""

from __future__ import annotations

from dsmoe.interop.architectures.architecture import Refused

_MLA = (
    "its attention (MLA) makes keys and values out of one normed low-rank latent, and every head has a part that is "
    "not rotated: grouped-query attention cannot be written as that"
)
DEEPSEEK_V2 = Refused("deepseek_v2", why_not_read=_MLA)
DEEPSEEK_V3 = Refused(
    "deepseek_v3",
    why_not_read=_MLA,
    why_not_written=f"{_MLA}. Its routing can: export to glm4_moe, which has DeepSeek-V3's (sigmoid scores, selection "
    "bias, groups, factor, shared expert) beside grouped-query attention",
)
