"""Procedures: one object per question about a smoothed classifier at one image.

A procedure fixes the sampling plan, turns votes into an answer, and writes and reads its own keys of the run file. A
live run, a resumed run, a replayed audit, a shard, a cluster worker and the server call the same object, and none of
them branches on its name. To add a question, add a module with a class and ``from_settings``, and a line to the
registry in :mod:`certify.smoothing.procedures.base`.

- :class:`Certify`: a class and a radius, from n0 and then n samples;
- :class:`Measure`: the same, stopping once the radius is known to a relative tolerance;
- :class:`Decide`: robust at given radii or not, with as few samples as possible;
- :class:`Predict`: a class without a radius, from n samples;
- :class:`Accuracy`: no answer about a single image, one or a few samples for the accuracy of all images together.

With probability at least 1 - alpha over the noise draws, the answer about an image is true or an abstention.
"""

from certify.smoothing.procedures.accuracy import Accuracy as Accuracy
from certify.smoothing.procedures.base import ESTIMATION as ESTIMATION
from certify.smoothing.procedures.base import PREDICTION as PREDICTION
from certify.smoothing.procedures.base import PROCEDURES as PROCEDURES
from certify.smoothing.procedures.base import SELECTION as SELECTION
from certify.smoothing.procedures.base import USUAL_SAMPLES as USUAL_SAMPLES
from certify.smoothing.procedures.base import Answer as Answer
from certify.smoothing.procedures.base import AnswerKeys as AnswerKeys
from certify.smoothing.procedures.base import Procedure as Procedure
from certify.smoothing.procedures.base import ProcedureSettings as ProcedureSettings
from certify.smoothing.procedures.base import RecordedVotes as RecordedVotes
from certify.smoothing.procedures.base import Sequential as Sequential
from certify.smoothing.procedures.base import Stopping as Stopping
from certify.smoothing.procedures.base import answer_keys as answer_keys
from certify.smoothing.procedures.base import draws_once as draws_once
from certify.smoothing.procedures.base import expected_samples as expected_samples
from certify.smoothing.procedures.base import needs_fixed_function as needs_fixed_function
from certify.smoothing.procedures.base import procedure_of as procedure_of
from certify.smoothing.procedures.base import samples as samples
from certify.smoothing.procedures.base import stage_tests as stage_tests
from certify.smoothing.procedures.certify import Certify as Certify
from certify.smoothing.procedures.decide import Decide as Decide
from certify.smoothing.procedures.measure import Measure as Measure
from certify.smoothing.procedures.predict import Predict as Predict
