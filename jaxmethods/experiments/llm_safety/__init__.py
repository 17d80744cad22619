"""Safety over the whole life of a language model: an attack, a defence and a metric for every stage."""
