"""Importing this lets FedLab be imported without torchvision, which only its image data sets use.

torchvision's ordinary build does not load beside a PyTorch for CPUs alone.
"""

import sys
from unittest import mock

sys.modules["torchvision"] = mock.MagicMock()
