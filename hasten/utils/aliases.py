"""Names of samplers and time grids in diffusers, k-diffusion and the interfaces built on them.

Where one is the same method it is an alias, with the identity in a comment; where hasten has only a similar method, the
error names that.
"""

from __future__ import annotations

import re
from collections.abc import Collection

__all__ = ["alias_of", "hint_for"]

ALIASES = {
    "samplers": {
        "euler": "ddim",  # y' = y + (q' - q) (y - x0) / q is the DDIM step
        "flow_match_euler": "ddim",
        "euler_a": "ddim:eta=1",  # sigma_up^2 = q'^2 (1 - q'^2 / q^2) is DDIM's variance at eta = 1
        "euler_ancestral": "ddim:eta=1",
        "dpmpp_2m": "dpm",
        "dpmpp_3m": "dpm:order=3",
        "dpmpp_2m_sde": "dpm:sde=true",
        "dpmpp_3m_sde": "dpm:order=3,sde=true",
        "dpmpp_2s": "dpm:multistep=false",
        "dpm_solver": "dpm:predict=eps",
        "dpmsolver": "dpm:predict=eps",
        "dpm_solverpp": "dpm",
        "dpmsolverpp": "dpm",
        "dpmpp": "dpm",
        "dpm_solver_multistep": "dpm",
        "dpm_solver_singlestep": "dpm:multistep=false",
        "pndm": "plms",
        "ipndm": "plms:start=ramp",
        "lms": "deis:order=4,variable=rho,lower_order_final=false",  # polynomials in sigma, integrated exactly
        "lms_discrete": "deis:order=4,variable=rho,lower_order_final=false",
        "lcm": "consistency",
        "dpm_solver_sde": "dpm:sde=true",
        "deis_multistep": "deis",
        "unipc_multistep": "unipc",
        "uni_pc_multistep": "unipc",
        "flow_match_heun": "heun",
        "uni_pc": "unipc",
        "sa_solver": "sa",
    },
    "times": {
        "linspace": "uniform",
        "normal": "uniform",
        "exponential": "lambda",  # equally spaced in log sigma
        "simple": "trailing",
        "sgm_uniform": "trailing",
    },
}
RELATIVES = {
    "samplers": {
        "dpmpp_sde": "dpm:sde=true (the multistep form, DPM++ 2M SDE)",
        "dpmpp_2s_ancestral": "dpm:sde=true",
        "dpm_2": "dpm:multistep=false,predict=eps",
        "dpm_2_a": "dpm:sde=true,predict=eps",
        "kdpm2": "dpm:multistep=false,predict=eps",
        "dpm_fast": "dpm:order=3,multistep=false,predict=eps",
        "dpm_adaptive": "probability_flow",
        "tcd": "consistency",
        "kdpm_2": "dpm:multistep=false,predict=eps",
        "kdpm_2_ancestral": "dpm:sde=true,predict=eps",
        "kdpm2_ancestral": "dpm:sde=true,predict=eps",
        "res_multistep": "unipc",
        "euler_cfg_pp": "ddim",
    },
    "times": {
        "leading": "trailing (leading ends short of the noisiest time; arXiv:2305.08891)",
        "beta": "angle",
        "kl_optimal": "angle",
        "polyexponential": "karras",
    },
}


def plain_name(name: str) -> str:
    """A name in lower case, its words joined by underscores.

    `"DPM++ 2M"` is `"dpmpp_2m"`. A class of diffusers is its words without the last, `"EulerDiscreteScheduler"` is
    `"euler_discrete"`, and a function of k-diffusion is without its `sample_` or `k_`.
    """
    name = name.strip().replace("++", "pp")
    if name.endswith("Scheduler"):
        name = re.sub(
            r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|(?<=2)(?=[A-Z])", "_", name.removesuffix("Scheduler")
        )
    return re.sub(r"^(sample|k)_", "", re.sub(r"[\s\-_]+", "_", name.lower()))


def own_name(name: str, names: Collection[str]) -> str | None:
    """The one of hasten's names that this is in another case or with other separators, as `"DDIM"`.

    Args:
        name: to look up.
        names: hasten's.
    """
    bare = plain_name(name).removesuffix("_discrete").replace("_", "")
    return next((one for one in names if one.replace("_", "") == bare), None)


def alias_of(folder: str, name: str) -> str | None:
    """The method with this name elsewhere, as `pick` reads it; None where the name is no alias.

    Args:
        folder: of the methods.
        name: to look up.
    """
    known = ALIASES.get(folder, {})
    return known.get(plain_name(name)) or known.get(plain_name(name).removesuffix("_discrete"))


def hint_for(folder: str, name: str) -> str | None:
    """A similar method for a name that hasten does not have, for the error message; None where there is none.

    Args:
        folder: of the methods.
        name: to look up.
    """
    normalized = plain_name(name)
    for end, grid in (("_karras", "karras"), ("_exponential", "lambda"), ("_simple", "trailing")):
        method = alias_of(folder, normalized.removesuffix(end)) or normalized.removesuffix(end)
        if folder == "samplers" and normalized.endswith(end):
            return f"sampler {method} with times {grid}"
    return RELATIVES.get(folder, {}).get(normalized) or RELATIVES.get(folder, {}).get(
        normalized.removesuffix("_discrete")
    )
