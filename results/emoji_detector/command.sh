#!/usr/bin/env bash
set -euo pipefail
cd "$(dirname "$0")/../.."
python -m rlg.pretraining.agreement --base tiny-sd3-emoji --output results/emoji_detector
