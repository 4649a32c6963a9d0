"""Class unlearning in JAX: pretrain, forget one class with an unlearning rule, measure what is left of it.

import jaxunlearn

records = jaxunlearn.run("resnet20-digits-class0", methods=["retain_finetune"], seeds=range(4))
print(records.table())
"""

from jaxunlearn.api import Records, run
from jaxunlearn.errors import UserError
from jaxunlearn.version import __version__

__all__ = ["Records", "UserError", "__version__", "run"]
