"""What the scripts in launch/ need before and after the ranks run; needs neither torch nor GPUs."""
