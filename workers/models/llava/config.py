"""A LLaVA checkpoint's configuration: a Llama language model, a CLIP tower and a projector between them.

Read from JSON alone. Fields that the files leave out take the defaults of transformers' LlavaConfig, LlamaConfig
and CLIPVisionConfig, which the checkpoints of the Hub rely on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_vlm.workers.models.json_fields import Fields, read_object
from dist_vlm.workers.models.spec import CheckpointError, ModelSpec

if TYPE_CHECKING:
    from transformers import LlavaConfig

DTYPES = ("float32", "bfloat16", "float16")
# Their frequencies are those of the sequence's length: see dist_vlm.workers.rotary.
LENGTH_DEPENDENT_ROPE_TYPES = ("dynamic", "longrope")
# What a tower's MLPs and the projector are served with; see dist_vlm.workers.models.llava.activations.
ACTIVATIONS = (
    "gelu",
    "gelu_10",
    "gelu_accurate",
    "gelu_fast",
    "gelu_new",
    "gelu_python",
    "gelu_python_tanh",
    "gelu_pytorch_tanh",
    "hardswish",
    "laplace",
    "leaky_relu",
    "linear",
    "mish",
    "quick_gelu",
    "relu",
    "relu2",
    "relu6",
    "sigmoid",
    "silu",
    "sqrtsoftplus",
    "swish",
    "tanh",
)
# Of a checkpoint without `vision_config`; with one, the fields it leaves out take CLIPVisionConfig's.
DEFAULT_TOWER = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}


@dataclass(frozen=True, slots=True)
class TextFacts:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    tied_head: bool
    attention_bias: bool
    mlp_bias: bool
    rope_type: str
    rope_theta: float

    @property
    def rope_parameters(self) -> dict[str, Any]:
        """Those of the type "default", as `dist_vlm.workers.rotary` takes them; other types have more."""
        return {"rope_type": self.rope_type, "rope_theta": self.rope_theta}


@dataclass(frozen=True, slots=True)
class VisionFacts:
    """The tower, what of it the projector reads, and the projector's own fields.

    feature_layers: indices into the tower's hidden states, 0 for the embeddings; their rows are concatenated.
    keeps_class_row: whether the row of the class embedding stays ("full") or is dropped ("default").
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    hidden_act: str
    layer_norm_eps: float
    image_size: int
    patch_size: int
    num_channels: int
    feature_layers: tuple[int, ...]
    keeps_class_row: bool
    projector_hidden_act: str
    projector_bias: bool

    @property
    def num_needed_layers(self) -> int:
        """Encoder layers to build."""
        return max(self.feature_layers)

    @property
    def num_tower_rows(self) -> int:
        """The class embedding's and the patches'."""
        return 1 + (self.image_size // self.patch_size) ** 2

    @property
    def num_rows(self) -> int:
        return self.num_tower_rows - (not self.keeps_class_row)

    @property
    def width(self) -> int:
        return self.hidden_size * len(self.feature_layers)

    def activation_size(self, text_hidden_size: int) -> int:
        """See `ModelSpec.image_activation_size`.

        The pixels and the selected rows stay to the end. Beside them, whichever is largest: attention's input, the
        queries, keys and values as one product and as three tensors, and the result; the MLP's input and three of its
        inner width (QuickGELU's factors among them); or the projector's three.
        """
        kept = self.num_channels * self.image_size**2 + self.num_rows * self.width
        attention = self.num_tower_rows * 8 * self.hidden_size
        mlp = self.num_tower_rows * (
            self.hidden_size + max(3 * self.intermediate_size, self.hidden_size + self.intermediate_size)
        )
        projector = self.num_rows * 3 * text_hidden_size
        return kept + max(attention, mlp, projector)


@dataclass(frozen=True, slots=True)
class LlavaFacts:
    text: TextFacts
    vision: VisionFacts
    image_token_id: int
    dtype: str


def read_facts(path: str, config: dict[str, Any] | None = None) -> LlavaFacts:
    """Checks config.json of the checkpoint directory `path`, or its content `config` where it was parsed already."""
    file = Path(path) / "config.json"
    root = Fields(file, read_object(file) if config is None else config)
    if root.values.get("quantization_config") is not None:
        raise root.error("quantization_config", "absent: quantized checkpoints are not served")
    text = _text_facts(root)
    name = "image_token_index" if root.values.get("image_token_index") is not None else "image_token_id"
    image_token_id = root.integer(name, 32000, minimum=0)
    if image_token_id >= text.vocab_size:
        raise root.error(name, f"below text_config.vocab_size {text.vocab_size}")
    return LlavaFacts(text, _vision_facts(root), image_token_id, _dtype(root))


def _dtype(root: Fields) -> str:
    text = root.section("text_config")
    for fields in (root, text):
        for name in ("dtype", "torch_dtype"):
            if fields.values.get(name) is not None:
                return fields.choice(name, "", DTYPES)
    return "float32"


def _text_facts(root: Fields) -> TextFacts:
    text = root.section("text_config")
    text.choice("model_type", "llama", ("llama",))
    text.choice("hidden_act", "silu", ("silu",))
    hidden_size = text.integer("hidden_size", 4096)
    num_heads = text.integer("num_attention_heads", 32)
    num_kv_heads = text.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise text.error("num_key_value_heads", f"a divisor of num_attention_heads {num_heads}")
    if hidden_size % num_heads:
        raise text.error("hidden_size", f"a multiple of num_attention_heads {num_heads}")
    head_dim = text.integer("head_dim", hidden_size // num_heads)
    if head_dim % 2:
        raise text.error("head_dim", "even")
    rope_type, rope_theta = _rope(text)
    return TextFacts(
        vocab_size=text.integer("vocab_size", 32000),
        hidden_size=hidden_size,
        intermediate_size=text.integer("intermediate_size", 11008),
        num_layers=text.integer("num_hidden_layers", 32),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=text.integer("max_position_embeddings", 2048),
        rms_norm_eps=text.number("rms_norm_eps", 1e-6),
        tied_head=root.flag("tie_word_embeddings", False) or text.flag("tie_word_embeddings", False),
        attention_bias=text.flag("attention_bias", False),
        mlp_bias=text.flag("mlp_bias", False),
        rope_type=rope_type,
        rope_theta=rope_theta,
    )


def _rope(text: Fields) -> tuple[str, float]:
    """Type and base, under whichever names the file has: `rope_scaling` is the older one, and goes first as in
    transformers."""
    rope = text.section("rope_scaling")
    if not rope.values:
        rope = text.section("rope_parameters")
    name = "rope_type" if rope.values.get("rope_type") is not None else "type"
    theta = text if rope.values.get("rope_theta") is None else rope
    return rope.text(name, "default"), theta.number("rope_theta", 10000.0)


def _vision_facts(root: Fields) -> VisionFacts:
    vision = root.section("vision_config")
    vision.choice("model_type", "clip_vision_model", ("clip_vision_model",))
    default = DEFAULT_TOWER if root.values.get("vision_config") is None else {}
    hidden_size = vision.integer("hidden_size", default.get("hidden_size", 768))
    num_layers = vision.integer("num_hidden_layers", default.get("num_hidden_layers", 12))
    num_heads = vision.integer("num_attention_heads", default.get("num_attention_heads", 12))
    if hidden_size % num_heads:
        raise vision.error("num_attention_heads", f"a divisor of hidden_size {hidden_size}")
    image_size = vision.integer("image_size", default.get("image_size", 224))
    patch_size = vision.integer("patch_size", default.get("patch_size", 32))
    if patch_size > image_size:
        raise vision.error("patch_size", f"at most image_size {image_size}")
    strategy = root.choice("vision_feature_select_strategy", "default", ("default", "full"))
    return VisionFacts(
        hidden_size=hidden_size,
        intermediate_size=vision.integer("intermediate_size", default.get("intermediate_size", 3072)),
        num_layers=num_layers,
        num_heads=num_heads,
        hidden_act=vision.choice("hidden_act", "quick_gelu", ACTIVATIONS),
        layer_norm_eps=vision.number("layer_norm_eps", 1e-5),
        image_size=image_size,
        patch_size=patch_size,
        num_channels=vision.integer("num_channels", 3),
        feature_layers=_feature_layers(root, num_layers),
        keeps_class_row=strategy == "full",
        projector_hidden_act=root.choice("projector_hidden_act", "gelu", ACTIVATIONS),
        projector_bias=root.flag("multimodal_projector_bias", True),
    )


def _feature_layers(root: Fields, num_layers: int) -> tuple[int, ...]:
    layers = root.integers("vision_feature_layer") or (-2,)
    num_states = num_layers + 1
    if any(not -num_states <= layer < num_states for layer in layers):
        raise root.error("vision_feature_layer", f"in [-{num_states}, {num_states}): the tower's hidden states")
    return tuple(layer % num_states for layer in layers)


def read_spec(path: str, config: dict[str, Any]) -> ModelSpec:
    """The facts that driver and ranks share."""
    facts = read_facts(path, config)
    text, vision = facts.text, facts.vision
    bos, eos, pad = (_token_ids(path, config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id"))
    return ModelSpec(
        family="llava",
        path=path,
        dtype=facts.dtype,
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_layers=text.num_layers,
        num_heads=text.num_heads,
        num_kv_heads=text.num_kv_heads,
        head_dim=text.head_dim,
        max_position_embeddings=text.max_position_embeddings,
        image_token_id=facts.image_token_id,
        image_feature_size=vision.num_rows,
        image_input_shape=(1, vision.num_channels, vision.image_size, vision.image_size),
        image_feature_width=vision.width,
        image_activation_size=vision.activation_size(text.hidden_size),
        bos_token_id=bos[0] if bos else 1,
        eos_token_ids=eos or (2,),
        pad_token_id=pad[0] if pad else None,
        is_prefix_cacheable=text.rope_type not in LENGTH_DEPENDENT_ROPE_TYPES,
    )


def _token_ids(path: str, config: dict[str, Any], name: str) -> tuple[int, ...]:
    """Special tokens: as generation_config.json has them, else config.json, else its text_config."""
    root = Fields(Path(path) / "config.json", config)
    places = [root, root.section("text_config")]
    generation = Path(path) / "generation_config.json"
    if generation.is_file():
        places.insert(0, Fields(generation, read_object(generation)))
    for fields in places:
        if (ids := fields.integers(name)) is not None:
            return ids
    return ()


def transformers_config(path: str) -> LlavaConfig:
    """The same file as transformers reads it. Raises `CheckpointError` with its reason where it refuses."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers.models.llava.configuration_llava import LlavaConfig

    file = Path(path) / "config.json"
    try:
        return LlavaConfig.from_dict(read_object(file))
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{file}: transformers refuses it: {error}") from error
