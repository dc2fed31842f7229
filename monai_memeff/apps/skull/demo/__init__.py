"""The main job on one real head: read a CT, cut a defect, complete the skull, and report what came out."""
