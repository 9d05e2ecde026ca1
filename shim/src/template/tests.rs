use super::*;

/// A configuration whose files are in `root`, and a template for it.
fn made(root: &Path) -> (Config, String) {
    for file in ["kernel", "image", "vmm"] {
        fs::write(root.join(file), file).unwrap();
    }
    let text = format!(
        "kernel = '{0}/kernel'\nimage = '{0}/image'\nvmm = '{0}/vmm'\n\
         template_directory = '{0}/templates'",
        root.display()
    );
    let config = Config::parse(&text, Path::new("config.toml")).unwrap();
    let stamp = |path: &Path| {
        let (device, inode, bytes, changed_ns) = identity(&fs::metadata(path).unwrap());
        Stamp { path: path.into(), device, inode, bytes, changed_ns, digest: "d".into() }
    };
    let name = format!("{}0123456789abcdef", prefix(config.vcpus, config.memory_mib));
    let directory = config.template_directory.join(&name);
    fs::create_dir_all(&directory).unwrap();
    let manifest = Manifest {
        version: MANIFEST_VERSION,
        release: env!("CARGO_PKG_VERSION").into(),
        kernel: stamp(&config.kernel),
        image: stamp(&config.image),
        vmm: stamp(&config.vmm),
        vcpus: config.vcpus,
        max_vcpus: max_vcpus(&config),
        memory_mib: config.memory_mib,
        command_line: command_line(&config, config.vcpus),
        processor: "any".into(),
        created_unix_seconds: 1,
        memory: memory_of(&directory),
    };
    fs::write(directory.join(MANIFEST), serde_json::to_vec(&manifest).unwrap()).unwrap();
    (config, name)
}

/// Writes the memory of a template.
fn memory_of(directory: &Path) -> Seal {
    fs::write(directory.join(MEMORY), "memory").unwrap();
    Seal::of(&fs::metadata(directory.join(MEMORY)).unwrap())
}

#[test]
fn template_whose_memory_was_changed_is_refused() {
    let spoil: [fn(&Path); 4] = [
        |path| fs::write(path, "MEMORY").unwrap(),
        |path| File::options().write(true).open(path).unwrap().set_len(1).unwrap(),
        |path| fs::remove_file(path).unwrap(),
        |path| {
            // The same size and time of change in content, as a copy may have them.
            let modified = fs::metadata(path).unwrap().modified().unwrap();
            fs::write(path, "mEmory").unwrap();
            File::options().write(true).open(path).unwrap().set_modified(modified).unwrap();
        },
    ];
    for spoil in spoil {
        let root = tempfile::tempdir().unwrap();
        let (config, name) = made(root.path());
        assert!(find(&config).is_ok());
        // The clock that a file system takes its times from goes in steps of up to 10 ms.
        std::thread::sleep(std::time::Duration::from_millis(25));
        spoil(&config.template_directory.join(&name).join(MEMORY));
        let error = find(&config).unwrap_err();
        assert!(matches!(&error, NoTemplate::Changed(named) if *named == name), "{error}");
        assert!(error.is_for_want_of_one() && error.to_string().contains("was changed"), "{error}");
    }
}

#[test]
fn template_that_fits_is_found_and_removed() {
    let root = tempfile::tempdir().unwrap();
    let (config, name) = made(root.path());
    assert_eq!(find(&config).unwrap().0, name);
    assert_eq!(names(&config.template_directory), std::slice::from_ref(&name));
    for wrong in ["", "..", "../templates", "1x128-other"] {
        assert!(remove(&config.template_directory, wrong).is_err(), "{wrong}");
    }
    remove(&config.template_directory, &name).unwrap();
    assert!(matches!(find(&config), Err(NoTemplate::None { .. })));
    assert_eq!(fs::read_dir(&config.template_directory).unwrap().count(), 0);
}

#[test]
fn template_that_does_not_fit_is_refused_by_what_is_another() {
    let root = tempfile::tempdir().unwrap();
    let (config, _) = made(root.path());
    let reason = |config: &Config| find(config).unwrap_err().to_string();
    let off = Config { templates: Templates::Off, ..config.clone() };
    assert!(reason(&off).contains("off"));
    let console = Config { debug_console: true, ..config.clone() };
    assert!(reason(&console).contains("console"));
    let smaller = Config { memory_mib: 64, ..config.clone() };
    assert!(reason(&smaller).contains("64 MiB"));
    let many = Config { vcpus: 9, ..config.clone() };
    assert!(reason(&many).contains("no more than 8 vCPUs"), "{}", reason(&many));
    let argument = Config { kernel_arguments: "quieter".into(), ..config.clone() };
    assert!(reason(&argument).contains("another kernel command line"), "{}", reason(&argument));
    // The same bytes in another file, as an update leaves them.
    fs::write(root.path().join("new"), "image").unwrap();
    fs::rename(root.path().join("new"), &config.image).unwrap();
    assert!(reason(&config).contains("another guest image"), "{}", reason(&config));
    fs::remove_file(&config.kernel).unwrap();
    assert!(reason(&config).contains("template.json"), "{}", reason(&config));
}

#[test]
fn pod_of_any_size_finds_the_largest_that_it_has_room_for() {
    let root = tempfile::tempdir().unwrap();
    let (config, small) = made(root.path());
    let from = config.template_directory.join(&small);
    let mut manifest = read_manifest(&from).unwrap();
    manifest.memory_mib = 1024;
    let large = format!("{}0123456789abcdef", prefix(1, 1024));
    let directory = config.template_directory.join(&large);
    fs::create_dir(&directory).unwrap();
    manifest.memory = memory_of(&directory);
    fs::write(directory.join(MANIFEST), serde_json::to_vec(&manifest).unwrap()).unwrap();
    for (vcpus, memory_mib, expected) in
        [(1, 128, &small), (8, 1023, &small), (1, 1024, &large), (8, 65536, &large)]
    {
        let config = Config { vcpus, memory_mib, ..config.clone() };
        assert_eq!(find(&config).unwrap().0, *expected, "{vcpus}x{memory_mib}");
    }
}

#[test]
fn growth_is_in_steps_and_enough() {
    let file = || tempfile::tempfile().unwrap();
    let template = |base_memory_mib| Template {
        name: "a".into(),
        memory: file(),
        state: file(),
        base_memory_mib,
        max_vcpus: 8,
    };
    for (base, wanted, grown) in [(128, 128, 128), (128, 129, 130), (127, 130, 131), (128, 4, 128)]
    {
        let template = template(base);
        assert_eq!(template.grown_mib(wanted), grown);
        assert_eq!(template.more_mib(grown), grown - base);
    }
}

#[test]
fn manifest_that_is_damaged_is_named() {
    let root = tempfile::tempdir().unwrap();
    let (config, name) = made(root.path());
    let path = config.template_directory.join(&name).join(MANIFEST);
    let good = fs::read_to_string(&path).unwrap();
    let other = good.replacen("\"version\":3", "\"version\":1", 1);
    let large = " ".repeat(MAX_MANIFEST_BYTES as usize + 1);
    for bad in ["", "{}", &good[..good.len() / 2], &other, &large] {
        fs::write(&path, bad).unwrap();
        let error = find(&config).unwrap_err();
        assert!(matches!(&error, NoTemplate::Unreadable { name: named, .. } if *named == name));
    }
}
