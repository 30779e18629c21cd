"""What a person should know before reading the tables of docs/rl-recipes.md: how they were made, and what they say."""

INTRODUCTION = (
    """`stemma run METHOD` repeats, on one core in minutes, the comparison that a paper rests its claims on. The numbers
    here are of models of 200,000 parameters on DialLock, a task made in code: they show that a method does what it
    says and in which regime, not how much it gains on a large model.""",
    """All methods of a table start from one policy, sample equally many tokens in training and are evaluated without
    prefixes on the same held-out problems with the same random numbers. Values are means over seeds with their
    standard error; a claim is tested on pairs of runs with one seed. "yes" means above zero by two standard errors, "in
    the mean" above zero, p is that of an exact sign-flip test, which cannot be lower than 1/8 with three seeds.""",
    """Tokens are counted per optimiser step as the update encodes them, with shared prefixes and without; seconds are
    medians over the steps that ran both forwards, on a machine that did other work too. The last column is the largest
    difference of a gradient between the two, relative to the largest gradient.""",
)

NOTES: dict[str, tuple[str, ...]] = {}
