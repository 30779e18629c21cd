"""What a person should know before reading the tables of docs/recipes.md: how they were made, and what they say."""

INTRODUCTION = (
    """`stemma run METHOD` repeats, on one core in 5 to 30 minutes, the comparison that a paper rests its claims on,
    with models that are made and trained here. The numbers show that a method does what it says and in which regime,
    not how much it gains on a large model.""",
    """Values are means over seeds with their standard error; a claim is tested on pairs of runs with one seed. "yes"
    means above zero by two standard errors, "in the mean" above zero, p is that of an exact sign-flip test, which
    cannot be lower than 1/8 with three seeds. Seconds were measured on a machine that did other work too; counts of
    tokens, operations and bytes do not depend on it. The commit is that of the report: finished runs are kept, and
    some were made by earlier commits with the same settings.""",
)

NOTES: dict[str, tuple[str, ...]] = {
    "rl": (
        """Models of 200,000 parameters on DialLock, a task made in code: a dial of two digits is turned from one number
        to another, a unit of one digit a move. The distance of a problem is the number of moves of its shortest
        solution, and an answer may take as many more as the slack says. In a demonstration with noise p every move is,
        with probability p, a random legal one instead of one that comes nearer.""",
        """All methods of a table start from one policy, and training ends with the step in which it has sampled the
        tokens of the setting, so that rows end a little above; a table that has exceptions names them. Evaluation is
        without prefixes, on the same held-out problems with the same random numbers. "Sampled tokens" holds what a
        method had sampled before training; "optimised tokens" are those that got gradient in RL, not in supervised
        steps.""",
        """Tokens are counted per optimiser step as the update encodes them, with shared prefixes and without; seconds
        are medians over the steps that ran both forwards. The last column is the largest difference of a gradient
        between the two, relative to the largest gradient.""",
    ),
    "tempo": (
        """From a start that saw clean demonstrations of near problems, TEMPO is a little above GRPO in the mean; from
        one that saw noisy demonstrations it is not. The difference is small against its error in both, so the honest
        reading is "not worse", and the 1.4 to 1.6 times of the paper do not show. The first start slips in its text
        twice as often, and slips are what a tree pins down best; in the second nearly all that is to be learnt is
        direction, one token in six, while the other tokens are certain and have no gradient, so that GRPO's even credit
        wastes little on them. That guess was made before the first start was tried. The values of the tree agree with
        Monte Carlo continuations of the same prefixes. Trials with groups of 8 and 32 and other learning rates from
        the noisier start, two to four pairs each, gave differences of either sign.""",
        """Runs from the noisier start, which is lower, sample 200,000 tokens each. Their area under the curve is taken
        over the first 140,000, as that of the others.""",
    ),
    "prefix-rft": (
        """Prefix-RFT leaves GRPO far behind at equally many sampled tokens, and gains next to nothing while its prefix
        is frozen, as the paper says. That the most uncertain fifth of the prefix tokens is better than all of them does
        not show. Supervised training on the same 48 demonstrations, in eight seconds, already ends higher, and GRPO
        after it far higher again: with perfect and cheap demonstrations the two-stage recipe wins clearly, as an audit
        of this literature (arXiv 2604.23747) found on large models.""",
        """SFT samples nothing and ends before RL begins: it is a point in the plot, and its row counts no tokens.""",
    ),
    "prefix-rl": (
        """Training on prefixed problems alone lifts success on problems without prefixes many times above the start,
        and clearly above GRPO's at equally many tokens sampled in training. Where GRPO gets the tokens of the rejection
        sampling on top of its own, PrefixRL is above it in the mean only, by less than two standard errors. Prefixes of
        other problems earn no reward and change nothing, in an eighth of the tokens. The traces come from a policy that
        saw better demonstrations, a stand-in for the paper's earlier runs; the start itself would have needed two to
        three times as many samples.""",
        """So sampled tokens differ on purpose: those of GRPO are the setting's; PrefixRL's are the same and the
        collection's before them, where its curves begin; GRPO with the collection's tokens has as many in all.""",
    ),
    "pppo": (
        """The beginning does decide, and a wrong one costs more than a right one gains. Training on it alone improves
        the whole, with a twentieth of the optimised tokens, and where GRPO has optimised as many tokens it has gained
        less. At equally many sampled tokens GRPO is far ahead: the claim does not reproduce at this scale, for two
        reasons that the last table shows. The first 15 % of an output decide about a quarter of the variance of its
        outcome, so more samples of them leave most of what can be learnt untouched; and what goes wrong afterwards
        moves from directions to ends. Outputs stop before they are there, because small models share everything
        between positions and nothing holds the untrained end in its place. The paper's models have an end that does not
        move.""",
        """The start appears with three values, of which none is wrong. The plot, and "end − start", have what every run
        evaluates before training, 4 completions a problem; "right" has 8 completions of the same problems, as the last
        evaluation has; P(correct) is of the 43 of 48 problems for which there are right and wrong outputs. The errors
        of differences to the start are over seeds, which share one evaluation of it; with "right" for the start the
        gain is a quarter smaller.""",
        """Tried without success: learning rates from 1e-4 to 5e-4 (from 2e-4 on, PPPO loses what it has gained), and
        twice as many outputs with one continuation each.""",
    ),
    "jrt": (
        """Where the order of a text matters, the paper's ranking shows in the mean: encoding both ways says best which
        element two sets share, reading twice comes next, and both depend less on the order than causal linear
        attention. Three seeds do not tell the first two apart, and with the larger state one seed of encoding both ways
        is below causal. The easier order is another one than in the paper: with the longer set first the answer is
        among the last tokens, which a short convolution sees. Softmax attention learns this slowly, and 800 steps are
        not the end of it. In recall of random pairs nothing tells beforehand which will be asked for; both are above
        causal in the mean, reading twice more so. Gaps to softmax attention do not close between two states that are
        both small.""",
        """Another form of the first task was tried before: do a set of one and a set of six have an element in common,
        yes or no? There, three seeds gave nothing, for either method at either state (reading twice +0.030 ± 0.036 and
        +0.009 ± 0.020 over causal, encoding both ways +0.049 ± 0.052 and +0.004 ± 0.047); all methods, softmax
        attention too, were between 0.57 and 0.87 and far from done. All methods have the same learning rate, which was
        not tuned for any of them.""",
        """A prefill takes time in proportion to the length and is faster than softmax attention's from 1024 tokens on,
        7 times at 8192, with eight features a head, on one thread.""",
    ),
    "hydragen": (
        """Below a prefix of 4096 tokens, 32 rows decode 4 times as fast as with repeated keys and values in place, and
        about 30 times as fast as with transformers' default cache, which is copied for every token; the cache is 31
        times as small. That a longer prefix costs next to nothing does not show. Sharing saves reading keys, not
        multiplying with them, and a CPU core is bound by the products; [generation](generation.md) has what they alone
        would allow.""",
    ),
    "ntk-attention": (
        """The approximation does what the theory says: its error falls with the length of the prefix and with the
        degree of the feature map, and its cost does not depend on the length; a real prefix of up to 128 keys is
        cheaper. Dividing the published map by the square root of the head size matters for short prefixes.""",
        """As a way to fine-tune it works, and less well than what it is compared with: with as many parameters P-tuning
        v2 gains half as much again, and LoRA twice as much; prefix tuning gains a fifth more, with more than four times
        as many parameters. Every method had its rate chosen on validation text, and every chosen rate lies inside the
        range that was tried. An untrained prefix should not be light: one that weighs as much as 32 keys, which the
        published map gives it with heads of this size, ends lower than one that weighs as much as one key. What the
        paper's theory is about, prefixes too long to be trained as keys and values, is not tried here.""",
    ),
    "prefix-kv": (
        """In attention alone the waterline does what it is for: the worst of eight planted layers errs less than with
        equal sizes at every share. A pyramid errs a little less still with a fifth or less kept, where it guesses the
        order of the layers right, and several times as much where it does not.""",
        """On text the paper's claim does not reproduce with its own score. Attention summed over queries favours the
        beginning of a prompt, which more queries see; the base model hardly looks further back than 32 bytes; and
        random tokens serve it better. With the sum divided by the number of queries that see a token, or with the votes
        of the last queries, half of the cache or a twentieth can stay at no measurable loss, as with the most recent
        tokens alone, so the loss tells nothing apart there. The divergence from the whole cache does: at equal votes,
        the waterline's sizes stay closer to it than equal ones down to a tenth kept, and with summed attention they
        make no difference. A profile does as well as a search for each prompt. On a model that needs its far context
        all of this may be otherwise.""",
        """All methods keep equally many bytes. Bytes fall with the share kept, times less, as a step has a part that
        does not read keys.""",
    ),
    "kvcomm": (
        """Turning keys to their new places is the large step; offsets from anchors halve what is left, and must be the
        agent's own. Two parts of the method earn nothing here: weights by likeness are no better than a mean, and
        neither the entropy rule nor the error of the second layer's keys tells good estimates from bad ones. How many
        anchors there are does matter: one is no better than none. So an agent reuses here only once it knows twelve:
        that is 0.78 of all prefills, of 0.83 that a run of 72 problems leaves to be reused. By the published rule,
        which on a model as small as this is not saturated, two suffice, and it then asks for a new anchor in two of
        three prefills, so that the paper's share is missed.""",
        """Computing a seventh of the tokens anew, as CacheBlend does, comes nearer to dense prefill by another factor
        of eight, with or without offsets. On these four layers it takes longer than a dense prefill up to chunks of 512
        bytes, 1.6 times as long at 128, and is a little faster at 1024 only: one of the four is run for all tokens to
        choose which. On thirty layers that would weigh less, which is not tried here. Texts that no agent has seen
        before must be encoded alone first, which pays from about 700 bytes on if only one agent reads them; the answers
        that agents generate bring their keys along.""",
    ),
}
