"""Human interaction generation: the toolkit of a survey (arXiv 2503.13120).

Fan, Huang, Cai, Du, "3D Human Interaction Generation: A Survey", 2025, orders the field into human-human
(hhi), human-object (hoi) and human-scene (hsi) interaction and proposes no method of its own. Here are
the representations, one conditional motion diffusion for the three, and the metrics of the three.

Source status: of the survey only the abstract and the opening were read; what is called (code) follows
the official repositories of InterGen, HumanML3D, MDM, OMOMO, CHOIS, AffordMotion, GMD and EDGE, (paper)
the papers, and (inferred) is ours.

Axes everywhere: B clips, T frames, E bodies (1 or 2), J joints, F features, V points. Positions are in
metres, y up unless said; a `mask` (.., T) is true at real frames.

  skeleton        joints, bones, feet and hands of the two skeletons
  rotations       quaternions and the 6D form
  representation  InterHuman 262, HumanML3D 263, positions: there and back; canonical frames, contacts
  scenes          solids with an analytic signed distance, objects along their path
  diffusion       cosine schedule, posterior, DDPM, DDIM, classifier-free guidance, sampling
  guidance        contact with an object at sampling, by CHOIS
  losses          InterGen's, MDM's, contact of hands and object, collision with a scene
  tasks           the three tasks in one interface
  metrics         distributions of embeddings
  physics         distances, feet, contact and penetration of single clips
"""
