"""Makes tests/data/tensorflow, with TensorFlow and Keras (``python tests/data/make_tensorflow.py`` where both are).

``ckpt``: a checkpoint of a trained model with its optimizer; ``saved``: the model exported as a SavedModel;
``slices``: a partitioned variable; ``values.npz``: what TensorFlow itself reads, by checkpoint and key.
"""

import os
import shutil
from pathlib import Path

os.environ.update(KERAS_BACKEND="tensorflow", CUDA_VISIBLE_DEVICES="")

import keras
import numpy as np
import tensorflow as tf

HERE = Path(__file__).parent / "tensorflow"
keras.utils.set_random_seed(0)
shutil.rmtree(HERE, ignore_errors=True)
layers = [
    keras.Input((None, 5)),
    keras.layers.LSTM(8, return_sequences=True),
    keras.layers.LSTM(4),
    keras.layers.Dense(3),
]
model = keras.Sequential(layers)
model.compile("adam", "mse")
random = np.random.default_rng(0)
model.fit(random.normal(size=(4, 6, 5)), random.normal(size=(4, 3)), verbose=0)
for variable in model.trainable_variables:  # no bias of zeros
    variable.assign(random.normal(size=variable.shape))

tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(str(HERE / "ckpt" / "ckpt"))
(HERE / "ckpt" / "config.json").write_text(model.to_json())
model.export(HERE / "saved", verbose=False)

with tf.Graph().as_default(), tf.compat.v1.Session() as session:
    partitioner = tf.compat.v1.fixed_size_partitioner(2)
    tf.compat.v1.get_variable("split", [6, 3], partitioner=partitioner, use_resource=True)
    session.run(tf.compat.v1.global_variables_initializer())
    (HERE / "slices").mkdir()
    tf.compat.v1.train.Saver().save(session, str(HERE / "slices" / "model"), write_meta_graph=False)
    (HERE / "slices" / "checkpoint").unlink()  # names this machine's folders

values = {}
for name, prefix in (("ckpt", "ckpt/ckpt-1"), ("saved", "saved/variables/variables")):
    reader = tf.train.load_checkpoint(str(HERE / prefix))
    for key in reader.get_variable_to_shape_map():
        if key != "_CHECKPOINTABLE_OBJECT_GRAPH":
            values[f"{name}:{key}"] = reader.get_tensor(key)
x = random.normal(size=(2, 6, 5)).astype("float32")
np.savez(HERE / "values.npz", x=x, y=model(x).numpy(), **values)
