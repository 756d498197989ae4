"""Which parameter belongs to which group of an optimiser's recipe."""

import re

# Of each group, a pattern that the whole path of a parameter fits, its names joined with "/". No path fits two.
GROUPS = {
    "matrices": r"(.*/)?(attention/(qkv|out|difference/queries)|mlp/(up|down))(/kernel)?",
    "head": r"head",
    "embeddings": r"(position_)?embedding",
    "scalars": r"(.*/)?(lambdas|value_residual|value_lambdas|(skip|stream|added|x0)_weights|bias|scale"
    r"|exclusive/strength)",
    "tables": r"value_embedding_\d+",
    "gates": r"(.*/)?\w*gate",
    "queries": r"depth_queries",
}


def parameter_group(path: tuple) -> str:
    """The group of the parameter at a path of JAX dictionary keys.

    Raises ValueError unless exactly one pattern fits: a new parameter needs a line above, so that none gets the rule of
    another kind in silence.
    """
    name = "/".join(key.key for key in path)
    fitting = [group for group, pattern in GROUPS.items() if re.fullmatch(pattern, name)]
    if len(fitting) != 1:
        raise ValueError(f"parameter {name} fits the patterns of {fitting or 'no group'}; see GROUPS in {__name__}")
    return fitting[0]
