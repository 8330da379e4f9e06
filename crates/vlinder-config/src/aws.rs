//! What the environment says about AWS, in the names that AWS gave.

use crate::{Config, Env};

/// Variables by which a credential or a region is given; without any of them (and of `s3.*`) nobody
/// meant this node to use AWS.
const TELLING: [&str; 9] = [
    "AWS_ACCESS_KEY_ID",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
];
/// Variables that belong to a credential: one of the configuration comes with none of them.
const CREDENTIAL: [&str; 7] = [
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_TOKEN",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
];

/// The `AWS_` variables.
pub fn variables(env: &Env) -> impl Iterator<Item = (&str, &str)> {
    env.vars()
        .filter(|(name, value)| name.starts_with("AWS_") && !value.is_empty())
}

/// The same for S3, with what `s3.*` says in the place of what the environment says; none at all where
/// neither says anything that access could be had by.
pub fn s3_variables(config: &Config, env: &Env) -> Vec<(String, String)> {
    let s3 = &config.s3;
    let mut all: Vec<(String, String)> = variables(env)
        .filter(|(name, _)| s3.access_key_id.is_none() || !CREDENTIAL.contains(name))
        .filter(|(name, _)| s3.endpoint.is_none() || !name.starts_with("AWS_ENDPOINT"))
        .filter(|(name, _)| s3.region.is_none() || !name.ends_with("REGION"))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
    let endpoint = s3
        .endpoint
        .as_ref()
        .map(|url| url.as_str().trim_end_matches('/'));
    let own = [
        ("AWS_ENDPOINT_URL_S3", endpoint),
        ("AWS_REGION", s3.region.as_deref()),
        ("AWS_ACCESS_KEY_ID", s3.access_key_id.as_deref()),
        (
            "AWS_SECRET_ACCESS_KEY",
            s3.secret_access_key.as_ref().map(|key| key.expose()),
        ),
    ];
    all.extend(
        own.into_iter()
            .filter_map(|(name, value)| Some((name.to_owned(), value?.to_owned()))),
    );
    if !all.iter().any(|(name, _)| TELLING.contains(&name.as_str())) {
        all.clear();
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Sources, load};

    fn found(toml: &str, vars: &[(&str, &str)]) -> Vec<String> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.toml");
        std::fs::write(&file, toml).unwrap();
        let env = vars
            .iter()
            .fold(Env::bare(dir.path(), "h"), |env, (name, value)| {
                env.with(name, *value)
            });
        let sources = Sources {
            config_file: Some(file),
            ..Sources::new(&env)
        };
        let config = load(&sources).unwrap().config;
        let mut all: Vec<String> = s3_variables(&config, &env)
            .into_iter()
            .map(|(name, value)| format!("{name}={value}"))
            .collect();
        all.sort();
        all
    }

    #[test]
    fn settings_stand_in_the_place_of_variables() {
        let vars = [
            ("AWS_ACCESS_KEY_ID", "env"),
            ("AWS_SECRET_ACCESS_KEY", "env"),
            ("AWS_SESSION_TOKEN", "env"),
            ("AWS_ENDPOINT_URL", "http://env"),
            ("AWS_DEFAULT_REGION", "env-1"),
            ("AWS_PROFILE", ""),
        ];
        let of_env = found("", &vars);
        assert_eq!(of_env.len(), 5, "{of_env:?}");
        let own = "[s3]\nendpoint = \"http://own:9000\"\nregion = \"own-1\"\n\
                   access_key_id = \"own\"\nsecret_access_key = \"own\"\n";
        let expected = [
            "AWS_ACCESS_KEY_ID=own",
            "AWS_ENDPOINT_URL_S3=http://own:9000",
            "AWS_REGION=own-1",
            "AWS_SECRET_ACCESS_KEY=own",
        ];
        assert_eq!(found(own, &vars), expected);
    }

    #[test]
    fn without_any_hint_there_is_no_access() {
        assert!(found("", &[("PATH", "/bin"), ("AWS_PAGER", "less")]).is_empty());
        assert_eq!(found("[s3]\nregion = \"eu-1\"\n", &[]), ["AWS_REGION=eu-1"]);
    }
}
