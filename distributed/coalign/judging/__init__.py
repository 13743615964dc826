"""From responses to ranked groups: rewards, measuring the judge, the best answer, candidates under each wording.

known_answers   answers whose quality is known, which measure the judge
calibration     what they say about it: thresholds, error rates, whether it is good enough
verdicts        which responses need the judge, its questions, and its scores as rewards
judge_model     the judge as a function from prompts to log-odds
best_answer     the distinct responses to one input, and the one that is best for all its wordings
groups          these responses written as each wording asks for them: what stage 2 trains on

A response is a `DistinctAnswer` while it is judged and a `Candidate` while it is ranked. In evaluation/ an answer is
what a model under test said, which has no reward. This package knows no model and no tokenizer: generation/ computes
the scores. Begin with launch/judge.py and verdicts, then launch/rank.py and groups.
"""
