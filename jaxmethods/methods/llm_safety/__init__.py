"""Safety over the whole life of a language model: one module per stage, equations only.

The frame is the review by Wang, Zhang, Zhou, Wu, Yu et al., "A comprehensive survey in LLM(-agent) full
stack safety: data, training and deployment", arXiv 2504.15585. It has no algorithm of its own; every
equation is from the paper that its docstring names. Sources: (code) the official code of that paper was
run for the golden file, (known) stated from knowledge of the paper, (inferred) a decision of ours.

likelihood     log-probabilities of labelled tokens, which the others take
memorisation   exposure, membership inference, Min-K%
privacy        DP-SGD and its accountant
private_tuning DP-LoRA: any `Tuner`, with the gradients of DP-SGD
preferences    DPO, conservative DPO, IPO
editing        ROME
unlearning     gradient ascent, GradDiff, KL, NPO, SimNPO, RMU; forget quality, model utility
attacks        GCG
defences       spectral filter, SafeLoRA, LISA, perplexity filter, SmoothLLM
watermark      KGW
"""
