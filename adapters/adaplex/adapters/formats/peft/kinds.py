"""PeftKind: the PEFT types that are served as merged weights, which PEFT itself computes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PeftKind:
    """One PEFT type: its config fields, and how PEFT builds and merges it."""

    name: str
    """PEFT's `peft_type`."""
    title: str
    """Name in the table of families."""
    fields: frozenset[str]
    """Config fields that change the answer, or the set of tensors."""
    harmless: frozenset[str] = frozenset()
    """Other config fields of the type, which affect training only."""
    shared: bool = False
    """True if modules share tensors, or their sizes depend on each other: all are built at once."""
    shapeless: bool = True
    """True if the model can be built on the meta device, without memory."""
    saves_all: bool = False
    """True if the checkpoint must contain every tensor, because some would otherwise depend on the
    base's exact weights."""
    exact_base: bool = False
    """True if the adapter depends on a decomposition of the base's weights, which quantizing the
    base changes."""
    moves_bias: bool = False
    """True if the adapter changes the base's bias."""
    required: tuple[tuple[str, bool], ...] = ()
    """Config fields, and the only value that is served."""
    loops: tuple[tuple[str, int], ...] = ()
    """Config fields that count iterations, and the largest accepted value."""


def _words(names: str) -> frozenset[str]:
    return frozenset(names.split())


CAYLEY = ("num_cayley_neumann_terms", 64)
KINDS = (
    PeftKind(
        "BOFT",
        "BOFT",
        _words("boft_block_size boft_block_num boft_n_butterfly_factor"),
        _words("boft_dropout"),
        shapeless=False,
        loops=(("boft_n_butterfly_factor", 16),),
    ),
    PeftKind(
        "C3A",
        "C3A",
        _words("block_size block_size_pattern"),
    ),
    PeftKind(
        "DEFT",
        "DEFT",
        _words("r decomposition_method alpha para"),
        _words("init_scale deft_dropout"),
    ),
    PeftKind(
        "DELORA",
        "DeLoRA",
        _words("r rank_pattern"),
        _words("delora_lambda lambda_pattern module_dropout"),
    ),
    PeftKind(
        "FOURIERFT",
        "FourierFT",
        _words("n_frequency scaling random_loc_seed n_frequency_pattern"),
    ),
    PeftKind(
        "GLORA",
        "GLoRA",
        _words("r config_A_B config_C config_D_E"),
        moves_bias=True,
    ),
    PeftKind(
        "GRALORA",
        "GraLoRA",
        _words("r hybrid_r alpha gralora_k"),
        _words("gralora_dropout"),
    ),
    PeftKind(
        "HIRA",
        "HiRA",
        _words("r rank_pattern"),
        _words("hira_dropout"),
    ),
    PeftKind(
        "HRA",
        "HRA",
        _words("r apply_GS"),
    ),
    PeftKind(
        "MISS",
        "MiSS and Bone",
        _words("r mini_r init_weights"),
        _words("miss_dropout"),
    ),
    PeftKind(
        "OFT",
        "OFT",
        _words("r oft_block_size coft eps block_share use_cayley_neumann num_cayley_neumann_terms"),
        _words("module_dropout"),
        loops=(CAYLEY,),
    ),
    PeftKind(
        "OSF",
        "OSF",
        _words("effective_rank rank_pattern"),
        _words("target_svd_config"),
        exact_base=True,
    ),
    PeftKind(
        "PEANUT",
        "PEANuT",
        _words("r depth act_fn scaling"),
        loops=(("depth", 64),),
    ),
    PeftKind(
        "PSOFT",
        "PSOFT",
        _words(
            "r psoft_alpha ab_svd_init psoft_svd psoft_svd_lowrank_niter "
            "random_seed psoft_orth psoft_mag_a psoft_mag_b use_cayley_neumann "
            "num_cayley_neumann_terms cayley_neumann_eps"
        ),
        _words("psoft_dropout"),
        exact_base=True,
        loops=(CAYLEY, ("psoft_svd_lowrank_niter", 64)),
    ),
    PeftKind(
        "PVERA",
        "PVeRA",
        _words("r projection_prng_key save_projection sample_at_inference"),
        _words("pvera_dropout d_initial generator_seed"),
        shared=True,
        required=(("sample_at_inference", False),),
    ),
    PeftKind(
        "RANDLORA",
        "RandLoRA",
        _words("r randlora_alpha projection_prng_key save_projection sparse very_sparse"),
        _words("randlora_dropout"),
        shared=True,
    ),
    PeftKind(
        "ROAD",
        "RoAd",
        _words("variant group_size"),
        moves_bias=True,
    ),
    PeftKind(
        "SHIRA",
        "SHiRA",
        _words("r mask_type random_seed"),
        shapeless=False,
    ),
    PeftKind(
        "SUPERTUNING",
        "Super and Supra",
        _words("r lora_alpha sparsity select_top save_precomputed_indices"),
        _words("lora_dropout"),
        required=(("save_precomputed_indices", True),),
    ),
    PeftKind(
        "TINYLORA",
        "TinyLoRA",
        _words("r u weight_tying projection_seed save_projection"),
        _words("init_v_bound tinylora_dropout"),
        shared=True,
        saves_all=True,
        required=(("save_projection", True),),
    ),
    PeftKind(
        "UNILORA",
        "Uni-LoRA",
        _words("r proj_seed theta_d_length save_indices"),
        _words("unilora_dropout init_theta_d_bound"),
        shared=True,
        shapeless=False,
    ),
    PeftKind(
        "VBLORA",
        "VB-LoRA",
        _words("r num_vectors vector_length topk save_only_topk_weights"),
        _words("vblora_dropout init_vector_bank_bound init_logits_std"),
        shared=True,
    ),
    PeftKind(
        "WAVEFT",
        "WaveFT",
        _words(
            "n_frequency scaling wavelet_family use_idwt random_loc_seed "
            "n_frequency_pattern proportional_parameters"
        ),
        shared=True,
    ),
)
