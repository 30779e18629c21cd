"""Options are checked before any work, and carry TRL's names and defaults."""

import dataclasses

import pytest

from stemma.rl.grpo import Config


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("num_generations", {"num_generations": 1}),
        ("temperature", {"temperature": 0.0}),
        ("top_p", {"top_p": 1.5}),
        ("top_k", {"top_k": -1}),
        ("max_steps", {"max_steps": 0}),
        ("max_completion_length", {"max_completion_length": 0}),
        ("per_device_train_batch_size", {"per_device_train_batch_size": 12}),
        ("per_device_train_batch_size", {"per_device_train_batch_size": 0}),
        ("steps_per_generation", {"gradient_accumulation_steps": 2, "steps_per_generation": 3}),
        ("epsilon", {"epsilon": 1.0}),
        ("epsilon_high", {"epsilon_high": 0.0}),
        ("epsilon_high", {"loss_type": "cispo"}),
        ("epsilon_high", {"loss_type": "cispo", "epsilon_high": 0.2}),
        ("delta", {"delta": 1.2}),
        ("delta", {"loss_type": "cispo", "epsilon_high": 5.0, "delta": 4.0}),
        ("loss_type", {"loss_type": "ppo"}),
        ("scale_rewards", {"scale_rewards": "std"}),
        ("importance_sampling_level", {"importance_sampling_level": "group"}),
        ("lr_scheduler_type", {"lr_scheduler_type": "step"}),
        ("credit", {"credit": "ppo"}),
        ("scale_rewards", {"credit": "rloo", "scale_rewards": "batch"}),
        ("kl_estimator", {"kl_estimator": "k4"}),
        ("kl_estimator", {"kl_estimator": "k1", "use_bias_correction_kl": False}),
        ("soft_punish_cache", {"soft_punish_cache": -1}),
        ("soft_punish_cache", {"soft_punish_cache": 513}),
        ("max_generation_batches", {"max_generation_batches": 1}),
        ("importance_sampling_mode", {"importance_sampling_mode": "token"}),
        (
            "importance_sampling_mode",
            {"importance_sampling_mode": "token_truncate", "importance_sampling_clip_max": None},
        ),
        ("importance_sampling_clip_max", {"importance_sampling_clip_max": 0.0}),
        ("importance_sampling_clip_min", {"importance_sampling_clip_min": -0.1}),
        ("importance_sampling_clip_min", {"importance_sampling_clip_min": 3.0}),
        ("adam_beta2", {"adam_beta2": 1.0}),
        ("beta", {"beta": -0.1}),
        ("max_tokens", {"max_tokens": 0}),
        ("compare_every", {"compare_every": -1}),
    ],
)
def test_bad_option_is_named_with_its_value(field: str, options: dict) -> None:
    with pytest.raises(ValueError, match=rf"^{field} must be .*got {options.get(field)!r}$"):
        Config(**options)


def test_steps_per_rollout_counts_optimiser_steps() -> None:
    assert Config().steps_per_rollout == 1
    config = Config(gradient_accumulation_steps=2, steps_per_generation=6, num_iterations=3)
    assert config.micro_batches_per_generation == 6
    assert config.steps_per_rollout == 9


@pytest.mark.trl
def test_names_and_defaults_are_those_of_trl() -> None:
    from trl import GRPOConfig

    theirs = {field.name: field.default for field in dataclasses.fields(GRPOConfig)}
    # TRL corrects for its one sampler, vLLM, by default; we have a sampler that needs no correction.
    theirs |= {name.removeprefix("vllm_"): theirs[name] for name in theirs if name.startswith("vllm_importance")}
    ours = {field.name: field.default for field in dataclasses.fields(Config)}
    of_our_own = {"shared_prefix", "max_tokens", "compare_every"}
    # TRL has these as another trainer, as a reward function, or not at all.
    variants = {"credit", "kl_estimator", "soft_punish_cache", "dynamic_sampling", "max_generation_batches"}
    assert set(ours) - set(theirs) == of_our_own | variants
    # Counted per process here as there, but whole groups; the rest are TrainingArguments' own defaults.
    different = {"max_steps", "per_device_train_batch_size", "bf16", "gradient_checkpointing", "lr_scheduler_type"}
    different |= {"importance_sampling_correction"}
    for name in set(ours) & set(theirs) - different:
        assert ours[name] == theirs[name], name
