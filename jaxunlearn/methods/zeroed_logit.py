"""The pretrained model's logits with the forgotten class's at zero. Submitted to the task by gemini-3.1-pro-preview.

5 MSE(z(retain), z0*(retain)) + MSE(z(forget), z0*(forget)): z0* are the pretrained model's logits, in eval mode, with
the forgotten class's set to 0; the means are over images and classes. Two forwards in train mode, retain first.

For classes.

Differs: nothing.

Values: the submission's.

Reads: retain images, forget images.
"""

from jaxunlearn.methods.rule import accuracy, loss_rule


@loss_rule
def rule(student, retain, forget, *, retain_weight: float = 5.0):
    def error(images):
        logits = student(images)
        target = student.teacher(images).at[:, student.context.forget_class].set(0)
        return ((logits - target) ** 2).mean(), logits

    kept, logits = error(retain.images)
    forgotten, _ = error(forget.images)
    return retain_weight * kept + forgotten, {"accuracy": accuracy(logits, retain.labels)}
