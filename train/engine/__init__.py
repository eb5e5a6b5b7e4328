"""What all objectives share: rows to [B, K] log-ratios, the training loop, and the likelihood trend.

Nothing here knows an objective: it is handed in as a function of log-ratios, rewards and mask.
"""

import logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it reports a kernel that is optional, at every start
