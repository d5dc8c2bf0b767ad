"""Studies run by the real workflow; see `study_testing`."""

import sys
from pathlib import Path

# the import mode `importlib` does not add a test's own folder to the path
sys.path.insert(0, str(Path(__file__).parent))
