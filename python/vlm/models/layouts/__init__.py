"""Published checkpoint layouts: names and shapes of Hugging Face models, mapped to ours and back.

`vlm` saves a model in such a layout whenever its options can be said there, so that `transformers` loads it
without conversion; every published directory of these layouts loads here.
"""

from vlm.models.layouts.base import PublishedLayout
from vlm.models.layouts.clip import CLIP
from vlm.models.layouts.llama import LLAMA, QWEN2
from vlm.models.layouts.llava import LLAVA
from vlm.models.layouts.siglip import SIGLIP
from vlm.models.layouts.swin import SWIN

LAYOUTS: dict[str, PublishedLayout] = {layout.model_type: layout for layout in (CLIP, SIGLIP, LLAMA, QWEN2, LLAVA, SWIN)}
"""By the `model_type` of config.json."""

__all__ = ["CLIP", "LAYOUTS", "LLAMA", "LLAVA", "QWEN2", "SIGLIP", "SWIN", "PublishedLayout"]
