"""Learning rates and sizes of the learning stages by the size of the model.

Published values where there are some, as tables of options that a run file overrides:

    7B     supervised 5e-6, 3 epochs; Stage-DPO 5e-7, 2 epochs, beta 0.3; reward models 1e-6; RLEIF 1e-7 with a KL
           coefficient of 0.4: Arena Learning, arXiv:2407.10627, section 5, on Mistral-7B and Mixtral-8x22B.
    70B    as 7B, but for supervised learning: half of it, as larger models of one recipe take it (Tulu 2,
           arXiv:2311.10702: 2e-5 for 7B and 13B, 1e-5 for 70B).
    8x22B  as 7B (Arena Learning trains both alike).
    1B     supervised 1e-5, near the 9.65e-6 of InstructGPT's models of 1.3B and 6B (arXiv:2203.02155, appendix C);
           the other rates are twice to ten times those of 7B, a rule of this project.
    135M   rates of this project's own trials on some ten thousand tokens; published recipes of such models take more
           rows. Stage-DPO's rate is close to the 1e-6 that SmolLM2's small models were aligned with.
"""

from collections.abc import Mapping
from typing import Any

Tables = Mapping[str, Mapping[str, Any]]


def _tables(
    sft: float,
    dpo: float,
    beta: float,
    reward: float,
    policy: float,
    kl: float,
    *,
    epochs: float,
    dpo_epochs: float,
    prompts: int,
    samples: int,
    tokens: int,
) -> Tables:
    return {
        "sft": {"training": {"lr": sft, "epochs": epochs}},
        "stage_dpo": {"beta": beta, "training": {"lr": dpo, "epochs": dpo_epochs}},
        "instruction_reward": {"training": {"lr": reward, "epochs": 1.0}},
        "process_reward": {"training": {"lr": reward, "epochs": 1.0}},
        "preference_reward": {"training": {"lr": reward, "epochs": 1.0}},
        "rleif": {
            "training": {"lr": policy},
            "critic": {"lr": 10 * policy},
            "kl": {"coefficient": kl},
            "rollout": {"prompts_per_step": prompts, "samples_per_prompt": samples, "max_new_tokens": tokens},
        },
    }


_LARGE = {"epochs": 3.0, "dpo_epochs": 2.0, "prompts": 64, "samples": 4, "tokens": 1024}
LEARNING: Mapping[str, Tables] = {
    "demo": {},
    "135M": _tables(*(1e-4, 2e-6, 0.2, 5e-5, 3e-6, 0.05), epochs=1.0, dpo_epochs=1.0, prompts=12, samples=4, tokens=64),
    "1B": _tables(*(1e-5, 1e-6, 0.3, 5e-6, 1e-6, 0.1), epochs=3.0, dpo_epochs=2.0, prompts=32, samples=4, tokens=512),
    "7B": _tables(*(5e-6, 5e-7, 0.3, 1e-6, 1e-7, 0.4), **_LARGE),
    "70B": _tables(*(2.5e-6, 5e-7, 0.3, 1e-6, 1e-7, 0.4), **_LARGE),
    "8x22B": _tables(*(5e-6, 5e-7, 0.3, 1e-6, 1e-7, 0.4), **_LARGE),
}
# Parameters up to which a model counts as one of a size.
_UP_TO = (("demo", 20e6), ("135M", 500e6), ("1B", 3.5e9), ("7B", 20e9), ("70B", 100e9))


def size_of(parameters: float, *, is_mixture: bool = False) -> str:
    """The row of `LEARNING` for a model with that many parameters; a large mixture of experts is like 8x22B."""
    name = next((name for name, most in _UP_TO if parameters <= most), "70B")
    return "8x22B" if is_mixture and parameters > 50e9 else name
