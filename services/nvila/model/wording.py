"""What a model is asked about a part of a recording, where a job says nothing else (`recordings/`). nvila-tiny learns
them (`train/data/tasks/events.py`)."""

DOES_IT_HAPPEN = "Does this happen in this part of the recording? Answer yes or no."
"""Behind a when-question."""
IS_IT_SO = "Is this so in this part of the recording? Answer yes or no."
"""Behind a standing question."""
LABEL = "What happens in this part of a recording? Answer in a few words."
NOTHING = "nothing"
"""The label of a part that makes no event of a timeline."""
CAPTION = "Describe what happens in this part of a recording, in one or two sentences."
