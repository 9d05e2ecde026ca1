//! A container's root, by the mounts that its snapshotter names.
//!
//! A snapshotter that leaves the owners of an image's files as they are says by the options `uidmap` and
//! `gidmap` whom they are to belong to. An overlay itself cannot be an idmapped mount: its lower layers are, of
//! which it makes copies of its own, so that ours go again at once.

use std::path::{Component, Path};

use containerd_shim_protos::types::mount::Mount as RootMount;
use rustix::mount::{MountPropagationFlags, UnmountFlags};
use vial_agent_protocol::users::Users;

use super::{ShareError, io, make_dir, remove_places};
use crate::{
    idmap::{Extent, Mapped, Namespaces},
    spec::Spec,
};

/// How the options of a root mount begin that say whom its files belong to.
const UIDS: &str = "uidmap=";
const GIDS: &str = "gidmap=";
const LOWER_DIRECTORIES: &str = "lowerdir=";
const OVERLAY: &str = "overlay";

/// Mounts a container's root at `root`. `staging` is a directory of ours in which nothing spreads.
pub(super) async fn mount(
    root: &Path,
    bundle: &Path,
    (mounts, spec): (&[RootMount], &Spec),
    (staging, namespaces): (&Path, &Namespaces),
) -> Result<(), ShareError> {
    if mounts.is_empty() {
        let path = &spec.root.as_ref().ok_or(ShareError::NoRoot)?.path;
        let source = bundle.join(path);
        rustix::mount::mount_bind_recursive(&source, root).map_err(io("bind", &source))?;
    }
    for mount in mounts {
        let mut target = root.to_path_buf();
        for part in Path::new(&mount.target).components() {
            match part {
                Component::RootDir | Component::CurDir => {}
                Component::Normal(part) => target.push(part),
                _ => {
                    let text = format!("the root mount's target '{}' leaves it", mount.target);
                    return Err(ShareError::Spec(text));
                }
            }
        }
        let plain = |mount: RootMount| {
            let target = target.clone();
            async move {
                containerd_shim::util::mount_rootfs(&mount, target).await.map_err(ShareError::Root)
            }
        };
        let (mount, users) = without_users(mount)?;
        match users {
            None => plain(mount).await?,
            Some(users) if mount.type_ == OVERLAY => {
                let lower = staging.join("lower");
                let mount = map_lower(mount, &lower, users, namespaces)?;
                plain(mount).await?;
                forget_lower(&lower)?;
            }
            Some(users) => {
                plain(mount).await?;
                map_mounted(&target, users, namespaces)?;
            }
        }
    }
    let isolated = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change(root, isolated).map_err(io("isolate", root))
}

/// The mount without the options that are not the file system's, and what they say.
fn without_users(mount: &RootMount) -> Result<(RootMount, Option<Users>), ShareError> {
    let mut mount = mount.clone();
    let value = |prefix: &str| {
        let mut values = mount.options.iter().filter_map(|option| option.strip_prefix(prefix));
        values.next_back().map(str::to_owned)
    };
    let users = match (value(UIDS), value(GIDS)) {
        (None, None) => None,
        (uids, gids) => {
            Some(Users::of_texts(&uids.unwrap_or_default(), &gids.unwrap_or_default())?)
        }
    };
    mount.options.retain(|option| !option.starts_with(UIDS) && !option.starts_with(GIDS));
    Ok((mount, users))
}

fn owners<E: Into<std::io::Error>>(path: &Path) -> impl FnOnce(E) -> ShareError {
    move |error| ShareError::RootUsers { path: path.into(), error: error.into() }
}

/// The overlay with lower layers of such users, which are mounted in `lower`, a directory to be.
fn map_lower(
    mut mount: RootMount,
    lower: &Path,
    users: Users,
    namespaces: &Namespaces,
) -> Result<RootMount, ShareError> {
    make_dir(lower)?;
    let namespace = namespaces.with(users).map_err(owners(lower))?;
    let options = mount.options.iter_mut();
    let mut count = 0;
    for option in options.filter(|option| option.starts_with(LOWER_DIRECTORIES)) {
        let mut mapped = Vec::new();
        for layer in option[LOWER_DIRECTORIES.len()..].split(':') {
            let place = lower.join(count.to_string());
            count += 1;
            make_dir(&place)?;
            let layer = Path::new(layer);
            let extent = Extent { read_only: true, ..Extent::default() };
            let tree = Mapped::new(layer, &namespace, extent).map_err(owners(layer))?;
            tree.attach(&place).map_err(io("attach a layer at", &place))?;
            mapped.push(place.display().to_string());
        }
        *option = format!("{LOWER_DIRECTORIES}{}", mapped.join(":"));
    }
    Ok(mount)
}

/// The overlay has its own.
fn forget_lower(lower: &Path) -> Result<(), ShareError> {
    for entry in std::fs::read_dir(lower).map_err(io("list", lower))? {
        let place = entry.map_err(io("list", lower))?.path();
        rustix::mount::unmount(&place, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)
            .map_err(io("unmount", &place))?;
    }
    remove_places(lower).map_err(io("remove", lower))
}

/// Puts what is mounted at `target` there as that of such users.
fn map_mounted(target: &Path, users: Users, namespaces: &Namespaces) -> Result<(), ShareError> {
    let namespace = namespaces.with(users).map_err(owners(target))?;
    let extent = Extent { recursive: true, ..Extent::default() };
    let tree = Mapped::new(target, &namespace, extent).map_err(owners(target))?;
    rustix::mount::unmount(target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)
        .map_err(io("unmount", target))?;
    tree.attach(target).map_err(io("attach the root at", target))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(options: &[&str]) -> RootMount {
        let options = options.iter().map(|option| (*option).to_owned()).collect();
        RootMount { type_: OVERLAY.into(), options, ..RootMount::default() }
    }

    #[test]
    fn users_of_a_root_are_no_options_of_its_file_system() {
        let (mount, users) = without_users(&with(&["index=off", "lowerdir=/a:/b"])).unwrap();
        assert_eq!((mount.options.len(), users), (2, None));
        let both = with(&["uidmap=0:1000:65536", "gidmap=0:2000:65536", "lowerdir=/a"]);
        let (mount, users) = without_users(&both).unwrap();
        assert_eq!(mount.options, ["lowerdir=/a"]);
        let users = users.unwrap();
        assert_eq!((users.uids.on_host(1), users.gids.on_host(1)), (Some(1001), Some(2001)));
        for wrong in [&["uidmap=0:1:2"][..], &["gidmap=0:1:2"], &["uidmap=x", "gidmap=0:1:2"]] {
            without_users(&with(wrong)).unwrap_err();
        }
    }
}
