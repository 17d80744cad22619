"""One module per paper; names without an underscore are public."""

from jaxmethods.methods import (
  acgkd as acgkd,
  adafreq as adafreq,
  bye as bye,
  cot_kinetics as cot_kinetics,
  epeagent as epeagent,
  fedssp as fedssp,
  fpl as fpl,
  ggeur as ggeur,
  gift as gift,
  human_interaction as human_interaction,
  llm_safety as llm_safety,
  lorasculpt as lorasculpt,
  rahfl as rahfl,
  spider as spider,
  thanora as thanora,
)
