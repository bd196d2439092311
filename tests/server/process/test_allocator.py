"""The memory of a server process after a load."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

SCRIPT = """
    import json, os
    from forwardpass_server.process import onednn
    # As the server does. With oneDNN, TensorFlow's CPU allocator keeps a second copy of the weights.
    onednn.decide("off")
    import numpy as np
    import tensorflow as tf
    from forwardpass_server import FunctionalModel
    from forwardpass_server.process import allocator
    from forwardpass_server.process import garbage
    from forwardpass_server.models.loading import TensorFlowLoader
    from forwardpass_server.calls.model import ModelSource

    def resident_mib():
        pages = int(open("/proc/self/statm").read().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def factory():
        @tf.function
        def predict_on_batch(model_weights, x, training):
            return x * tf.add_n([weight[0] for weight in model_weights[0]])

        spec = tf.TensorSpec([None], tf.float32)
        return FunctionalModel(
            initial_weights=(tuple(np.ones(2**22, np.float32) for _ in range(16)), ()),
            predict_on_batch_fn=predict_on_batch,
            loss_fn=lambda output, label, sample_weight=None: tf.reduce_mean(output - label),
            input_spec=(spec, spec),
        )

    allocator.keep_freed_memory()
    loader = TensorFlowLoader("cpu")
    before = resident_mib()
    model = loader.load(ModelSource("m", 1, factory="__main__:factory"))
    loaded = resident_mib()
    garbage.collect()
    print(json.dumps({"loaded": loaded - before, "collected": resident_mib() - before}))
"""


def test_a_loaded_model_takes_little_more_than_its_weights():
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    # 256 MiB of weights, and TensorFlow's memory for the first graphs. The load itself takes more than 1 GiB.
    assert 256 < found["collected"] < 1.3 * 256, found
